"""The tile kernels once more, for up to 64 rows, without shared memory: weights go from memory straight into the registers that
the tensor cores read, and most of them before the launch's wait.

Written in Gluon (Triton with explicit layouts), for two things that Triton does not let one say. A warp's fragment of W
(mma m16n8k16) is loaded by 16-byte loads: with k_width 8 a thread's share of a row is eight neighbours, a permutation of K that
W and x have in common and a sum does not notice. And loads before `griddepcontrol.wait` stay before it, for no pipeline moves
them. The kernels take the arguments of their Triton twins, which are their references and what runs elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from model_core.kernels.decode.tiles import columns
from model_core.kernels.runtime import cdiv, gl, gluon_jit, triton

if triton is not None and gl.constexpr is not int:
    from triton.experimental.gluon.language.nvidia.ampere import mma_v2


@dataclass(frozen=True)
class RegisterTiles:
    """rows: rows of W per program (of each half where a program has pairs), 16 per warp; chunk: columns per step; splits:
    programs along K; depth: steps whose weights are in flight."""

    rows: int
    chunk: int
    splits: int
    depth: int

    @property
    def warps(self) -> int:
        return self.rows // 16

    def divides(self, width: int) -> bool:
        """Whether K columns fall into whole steps."""
        return width % (self.chunk * self.splits) == 0 and width // (self.chunk * self.splits) >= self.depth

    def grid(self, out_rows: int, count: int) -> tuple[int, int, int]:
        assert out_rows % self.rows == 0, (out_rows, self)
        return cdiv(count, columns(count)), out_rows // self.rows, self.splits

    def options(self, count: int, **more: Any) -> dict[str, Any]:
        return dict(BM=columns(count), R=self.rows, BK=self.chunk, SPLITS=self.splits, DEPTH=self.depth,
                    num_warps=self.warps, **more)  # fmt: skip


@gluon_jit
def _follow(PDL: gl.constexpr):
    """products.follow, in Gluon."""
    if PDL:
        gl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
        gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon_jit
def _product(
    x_ptr, w_ptr, first, other_first, m0, M, split,
    K: gl.constexpr, BM: gl.constexpr, R: gl.constexpr, BK: gl.constexpr, SPLITS: gl.constexpr, DEPTH: gl.constexpr,
    PAIR: gl.constexpr, MMA: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """W rows first.. [R] (and other_first.. if PAIR) times x rows m0.. [BM] over this split's columns, float32 [R, BM]."""
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 8)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 8)
    CHUNKS: gl.constexpr = K // (SPLITS * BK)
    begin = split * (CHUNKS * BK)
    n = gl.arange(0, R, layout=gl.SliceLayout(1, A))
    k = begin + gl.arange(0, BK, layout=gl.SliceLayout(0, A))
    at = w_ptr + (first + n).to(gl.int64)[:, None] * K + k[None, :]
    other_at = w_ptr + (other_first + n).to(gl.int64)[:, None] * K + k[None, :]
    w = ()
    v = ()
    for c in gl.static_range(DEPTH):
        w = w + (gl.load(at + c * BK, eviction_policy="evict_first"),)  # type: ignore[assignment]
        if PAIR:
            v = v + (gl.load(other_at + c * BK, eviction_policy="evict_first"),)  # type: ignore[assignment]
    _follow(PDL)
    m = m0 + gl.arange(0, BM, layout=gl.SliceLayout(0, B))
    x_k = begin + gl.arange(0, BK, layout=gl.SliceLayout(1, B))
    x_at = x_ptr + m[None, :] * K + x_k[:, None]
    acc = gl.zeros([R, BM], gl.float32, layout=MMA)
    other = gl.zeros([R, BM], gl.float32, layout=MMA)
    for c in gl.static_range(CHUNKS):
        x = gl.load(x_at + c * BK, mask=(m < M)[None, :], other=0.0)
        acc = mma_v2(w[c], x, acc)
        if PAIR:
            other = mma_v2(v[c], x, other)
        if c + DEPTH < CHUNKS:
            w = w + (gl.load(at + (c + DEPTH) * BK, eviction_policy="evict_first"),)  # type: ignore[assignment]
            if PAIR:
                v = v + (gl.load(other_at + (c + DEPTH) * BK, eviction_policy="evict_first"),)  # type: ignore[assignment]
    return acc, other


@gluon_jit
def _add_splits(
    acc, other, part_ptr, arrived_ptr, split, BM: gl.constexpr, R: gl.constexpr, SPLITS: gl.constexpr, PAIR: gl.constexpr,
    MMA: gl.constexpr,
):  # fmt: skip
    """tiles.add_splits, in Gluon."""
    last = True
    if SPLITS > 1:
        tile = gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)
        SIZE: gl.constexpr = R * BM * (2 if PAIR else 1)
        n = gl.arange(0, R, layout=gl.SliceLayout(1, MMA))
        m = gl.arange(0, BM, layout=gl.SliceLayout(0, MMA))
        inside = m[None, :] * R + n[:, None]
        base = part_ptr + (tile * SPLITS).to(gl.int64) * SIZE
        gl.store(base + split * SIZE + inside, acc)
        if PAIR:
            gl.store(base + split * SIZE + R * BM + inside, other)
        gl.thread_barrier()  # all stores before the arrival
        last = gl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == SPLITS - 1
        if last:
            gl.thread_barrier()
            acc = gl.zeros([R, BM], gl.float32, layout=MMA)
            other = gl.zeros([R, BM], gl.float32, layout=MMA)
            for s in gl.static_range(SPLITS):
                acc += gl.load(base + s * SIZE + inside, cache_modifier=".cg")
                if PAIR:
                    other += gl.load(base + s * SIZE + R * BM + inside, cache_modifier=".cg")
            gl.store(arrived_ptr + tile, 0)
    return acc, other, last


@gluon_jit
def _norm_factor(
    squares_ptr, m, M, eps, PARTS: gl.constexpr, H: gl.constexpr, ROWS: gl.constexpr, R: gl.constexpr, BM: gl.constexpr,
    MMA: gl.constexpr,
):  # fmt: skip
    """tiles.norm_factor, in Gluon: [BM], along the columns of the accumulator."""
    total = gl.zeros([BM], gl.float32, layout=gl.SliceLayout(0, MMA))
    part = gl.arange(0, R, layout=gl.SliceLayout(1, MMA))
    for first in gl.static_range(0, PARTS, R):
        at = squares_ptr + (first + part)[:, None] * ROWS + m[None, :]
        total += gl.sum(gl.load(at, mask=(first + part < PARTS)[:, None] & (m < M)[None, :], other=0.0), axis=0)
    return gl.rsqrt(total / H + eps)


@gluon_jit(do_not_specialize=["M"])
def project_kernel(
    x_ptr, w_ptr, gain_ptr, residual_ptr, scaled_ptr, squares_ptr, part_ptr, arrived_ptr, M,
    BM: gl.constexpr, N: gl.constexpr, K: gl.constexpr, R: gl.constexpr, BK: gl.constexpr, SPLITS: gl.constexpr,
    DEPTH: gl.constexpr, ROWS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [R // 16, 1], [16, 8])
    first, split = gl.program_id(1) * R, gl.program_id(2)
    m0 = gl.program_id(0) * BM
    acc, other = _product(x_ptr, w_ptr, first, first, m0, M, split, K, BM, R, BK, SPLITS, DEPTH, False, MMA, PDL)
    n = first + gl.arange(0, R, layout=gl.SliceLayout(1, MMA))
    m = m0 + gl.arange(0, BM, layout=gl.SliceLayout(0, MMA))
    present = (m < M)[None, :]
    at = m[None, :] * N + n[:, None]
    base = gl.load(residual_ptr + at, mask=present, other=0.0).to(gl.float32)
    gain = gl.load(gain_ptr + n).to(gl.float32)
    acc, other, last = _add_splits(acc, other, part_ptr, arrived_ptr, split, BM, R, SPLITS, False, MMA)
    if last:
        rounded = (base + acc).to(residual_ptr.dtype.element_ty)
        wide = gl.where(present, rounded.to(gl.float32), 0.0)
        gl.store(residual_ptr + at, rounded, mask=present)
        gl.store(scaled_ptr + at, (wide * gain[:, None]).to(scaled_ptr.dtype.element_ty), mask=present)
        gl.store(squares_ptr + gl.program_id(1) * ROWS + m, gl.sum(wide * wide, axis=0), mask=m < M)


@gluon_jit(do_not_specialize=["M"])
def gate_up_kernel(
    x_ptr, squares_ptr, w_ptr, out_ptr, part_ptr, arrived_ptr, eps, M,
    BM: gl.constexpr, INNER: gl.constexpr, K: gl.constexpr, R: gl.constexpr, BK: gl.constexpr, SPLITS: gl.constexpr,
    DEPTH: gl.constexpr, PARTS: gl.constexpr, ROWS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [R // 16, 1], [16, 8])
    first, split = gl.program_id(1) * R, gl.program_id(2)
    m0 = gl.program_id(0) * BM
    gate, up = _product(x_ptr, w_ptr, first, first + INNER, m0, M, split, K, BM, R, BK, SPLITS, DEPTH, True, MMA, PDL)
    n = first + gl.arange(0, R, layout=gl.SliceLayout(1, MMA))
    m = m0 + gl.arange(0, BM, layout=gl.SliceLayout(0, MMA))
    factor = _norm_factor(squares_ptr, m, M, eps, PARTS, K, ROWS, R, BM, MMA)[None, :]
    gate, up, last = _add_splits(gate, up, part_ptr, arrived_ptr, split, BM, R, SPLITS, True, MMA)
    if last:
        gate = gate * factor
        value = gate / (1.0 + gl.exp(-gate)) * (up * factor)
        gl.store(out_ptr + m[None, :] * INNER + n[:, None], value.to(out_ptr.dtype.element_ty), mask=(m < M)[None, :])


@gluon_jit(do_not_specialize=["M"])
def head_kernel(
    x_ptr, squares_ptr, w_ptr, out_ptr, eps, M,
    BM: gl.constexpr, N: gl.constexpr, K: gl.constexpr, R: gl.constexpr, BK: gl.constexpr, SPLITS: gl.constexpr,
    DEPTH: gl.constexpr, PARTS: gl.constexpr, ROWS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [R // 16, 1], [16, 8])
    first = gl.program_id(1) * R
    m0 = gl.program_id(0) * BM
    acc, _ = _product(x_ptr, w_ptr, first, first, m0, M, 0, K, BM, R, BK, SPLITS, DEPTH, False, MMA, PDL)
    n = first + gl.arange(0, R, layout=gl.SliceLayout(1, MMA))
    m = m0 + gl.arange(0, BM, layout=gl.SliceLayout(0, MMA))
    factor = _norm_factor(squares_ptr, m, M, eps, PARTS, K, ROWS, R, BM, MMA)[None, :]
    gl.store(out_ptr + m.to(gl.int64)[None, :] * N + n[:, None], acc * factor, mask=(m < M)[None, :])


@gluon_jit(do_not_specialize=["M"])
def qkv_kernel(
    x_ptr, squares_ptr, w_ptr, bias_ptr, cos_sin_ptr, rows_ptr, position_ptr, table_ptr, q_ptr, k_ptr, v_ptr,
    part_ptr, arrived_ptr, eps, table_row, k_page, k_slot, k_head, v_page, v_slot, v_head, M,
    BM: gl.constexpr, K: gl.constexpr, D: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr,
    R: gl.constexpr, BK: gl.constexpr, SPLITS: gl.constexpr, DEPTH: gl.constexpr, PAGE: gl.constexpr,
    BIAS: gl.constexpr, PARTS: gl.constexpr, ROWS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [R // 16, 1], [16, 8])
    HALF: gl.constexpr = D // 2
    split = gl.program_id(2)
    head = gl.program_id(1) * R // HALF  # R divides HALF: a program stays inside one head
    inside = gl.program_id(1) * R % HALF
    first = head * D + inside
    m0 = gl.program_id(0) * BM
    a, b = _product(x_ptr, w_ptr, first, first + HALF, m0, M, split, K, BM, R, BK, SPLITS, DEPTH, True, MMA, PDL)
    d = inside + gl.arange(0, R, layout=gl.SliceLayout(1, MMA))
    m = m0 + gl.arange(0, BM, layout=gl.SliceLayout(0, MMA))
    present = (m < M)[None, :]
    slot = gl.load(rows_ptr + m, mask=m < M, other=0)
    position = gl.load(position_ptr + slot, mask=m < M, other=0)
    page = gl.load(table_ptr + slot * table_row + position // PAGE, mask=m < M, other=0).to(gl.int64)[None, :]
    offset = (position % PAGE)[None, :]
    turned = present & (head < HEADS + KV_HEADS)
    cos = gl.load(cos_sin_ptr + position[None, :] * D + d[:, None], mask=turned, other=1.0)
    sin = gl.load(cos_sin_ptr + position[None, :] * D + HALF + d[:, None], mask=turned, other=0.0)
    factor = _norm_factor(squares_ptr, m, M, eps, PARTS, K, ROWS, R, BM, MMA)[None, :]
    a, b, last = _add_splits(a, b, part_ptr, arrived_ptr, split, BM, R, SPLITS, True, MMA)
    if last:
        a = a * factor
        b = b * factor
        if BIAS:
            n = first + gl.arange(0, R, layout=gl.SliceLayout(1, MMA))
            a += gl.load(bias_ptr + n).to(gl.float32)[:, None]
            b += gl.load(bias_ptr + n + HALF).to(gl.float32)[:, None]
        low = (a * cos - b * sin).to(q_ptr.dtype.element_ty)
        high = (b * cos + a * sin).to(q_ptr.dtype.element_ty)
        if head < HEADS:
            at = q_ptr + (m[None, :] * HEADS + head) * D + d[:, None]
            gl.store(at, low, mask=present)
            gl.store(at + HALF, high, mask=present)
        elif head < HEADS + KV_HEADS:
            at = k_ptr + page * k_page + offset * k_slot + (head - HEADS) * k_head + d[:, None]
            gl.store(at, low, mask=present)
            gl.store(at + HALF, high, mask=present)
        else:
            at = v_ptr + page * v_page + offset * v_slot + (head - HEADS - KV_HEADS) * v_head + d[:, None]
            gl.store(at, low, mask=present)
            gl.store(at + HALF, high, mask=present)
