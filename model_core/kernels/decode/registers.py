"""The tile kernels once more, for up to 32 rows: weights go from memory straight into the registers that the tensor cores read,
most of them before the launch's wait, and the warps of a program share out K, so that no other program has a part of the sum.

Written in Gluon (Triton with explicit layouts), for three things that Triton does not let one say. A warp's fragment of W
(mma m16n8k16) is loaded by 16-byte loads: with k_width 8 a thread's share of a row is eight neighbours, a permutation of K that
W and x have in common and a sum does not notice. Loads before `griddepcontrol.wait` stay before it, for no pipeline moves them.
And a batch dimension laid over the warps makes each of them multiply its own columns. The kernels take the arguments of their
Triton twins, which are their references and what runs elsewhere.
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
    """rows: rows of W per program, a multiple of 16 (pairs count twice); chunk: columns per warp and step, at least 32; depth:
    steps whose weights are in flight; warps: along K."""

    rows: int
    chunk: int
    depth: int
    warps: int

    def divides(self, width: int) -> bool:
        """Whether K = width columns fall into whole steps."""
        return width % (self.chunk * self.warps) == 0 and width // (self.chunk * self.warps) >= self.depth

    def grid(self, out_rows: int, count: int) -> tuple[int, int]:
        """out_rows: rows of W, both halves counted."""
        assert out_rows % self.rows == 0, (out_rows, self)
        return cdiv(count, columns(count)), out_rows // self.rows

    def options(self, count: int, **more: Any) -> dict[str, Any]:
        return dict(BM=columns(count), R=self.rows, BK=self.chunk, DEPTH=self.depth, WARPS=self.warps, num_warps=self.warps,
                    **more)  # fmt: skip


@gluon_jit
def _follow(PDL: gl.constexpr):
    """products.follow, in Gluon."""
    if PDL:
        gl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
        gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon_jit
def _product(
    x_ptr, w_ptr, first, other, m0, M,
    K: gl.constexpr, BM: gl.constexpr, R: gl.constexpr, BK: gl.constexpr, DEPTH: gl.constexpr, WARPS: gl.constexpr,
    PAIR: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """W rows times x rows m0.. [BM], float32 [R, BM].

    W rows are first.. [R]; if PAIR, of each 16 of them 8 are from first.. and 8 from other.., so that partners end up in one
    thread.
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 8)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 8)
    SHARE: gl.constexpr = K // WARPS
    r = gl.arange(0, R, layout=gl.SliceLayout(0, gl.SliceLayout(2, A)))
    n = gl.where(r % 16 < 8, first, other) + r // 16 * 8 + r % 8 if PAIR else first + r
    share = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, A))) * SHARE
    k = gl.arange(0, BK, layout=gl.SliceLayout(0, gl.SliceLayout(1, A)))
    at = w_ptr + n.to(gl.int64)[None, :, None] * K + share[:, None, None] + k[None, None, :]
    w = ()
    for c in gl.static_range(DEPTH):
        w = w + (gl.load(at + c * BK, eviction_policy="evict_first"),)  # type: ignore[assignment]
    _follow(PDL)
    m = m0 + gl.arange(0, BM, layout=gl.SliceLayout(0, gl.SliceLayout(1, B)))
    x_k = gl.arange(0, BK, layout=gl.SliceLayout(0, gl.SliceLayout(2, B)))
    x_share = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, B))) * SHARE
    x_at = x_ptr + m[None, None, :] * K + x_share[:, None, None] + x_k[None, :, None]
    acc = gl.zeros([WARPS, R, BM], gl.float32, layout=MMA)
    for c in gl.static_range(SHARE // BK):
        x = gl.load(x_at + c * BK, mask=(m < M)[None, None, :], other=0.0)
        acc = mma_v2(w[c], x, acc)
        if c + DEPTH < SHARE // BK:
            w = w + (gl.load(at + (c + DEPTH) * BK, eviction_policy="evict_first"),)  # type: ignore[assignment]
    return gl.sum(acc, axis=0)


@gluon_jit
def _halves(value, R: gl.constexpr, BM: gl.constexpr, E: gl.constexpr):
    """The pairs of a product: [R, BM] -> two of [R / 2, BM], in layout E."""
    low, high = gl.split(value.reshape([R // 16, 2, 8, BM]).permute([0, 2, 3, 1]))
    return gl.convert_layout(low.reshape([R // 2, BM]), E), gl.convert_layout(high.reshape([R // 2, BM]), E)


@gluon_jit
def _norm_factor(
    squares_ptr, m, M, eps, PARTS: gl.constexpr, H: gl.constexpr, ROWS: gl.constexpr, BM: gl.constexpr, E: gl.constexpr
):
    """tiles.norm_factor, in Gluon: [BM], along the columns of layout E."""
    STEP: gl.constexpr = 8
    total = gl.zeros([BM], gl.float32, layout=gl.SliceLayout(0, E))
    part = gl.arange(0, STEP, layout=gl.SliceLayout(1, E))
    for first in gl.static_range(0, PARTS, STEP):
        at = squares_ptr + (first + part)[:, None] * ROWS + m[None, :]
        total += gl.sum(gl.load(at, mask=(first + part < PARTS)[:, None] & (m < M)[None, :], other=0.0), axis=0)
    return gl.rsqrt(total / H + eps)


@gluon_jit(do_not_specialize=["M"])
def project_kernel(
    x_ptr, w_ptr, gain_ptr, residual_ptr, scaled_ptr, squares_ptr, M,
    BM: gl.constexpr, N: gl.constexpr, K: gl.constexpr, R: gl.constexpr, BK: gl.constexpr, DEPTH: gl.constexpr,
    WARPS: gl.constexpr, ROWS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    E: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [1, WARPS], [0, 1])
    first, m0 = gl.program_id(1) * R, gl.program_id(0) * BM
    acc = gl.convert_layout(_product(x_ptr, w_ptr, first, first, m0, M, K, BM, R, BK, DEPTH, WARPS, False, PDL), E)
    n = first + gl.arange(0, R, layout=gl.SliceLayout(1, E))
    m = m0 + gl.arange(0, BM, layout=gl.SliceLayout(0, E))
    present = (m < M)[None, :]
    at = m[None, :] * N + n[:, None]
    base = gl.load(residual_ptr + at, mask=present, other=0.0).to(gl.float32)
    rounded = (base + acc).to(residual_ptr.dtype.element_ty)
    wide = gl.where(present, rounded.to(gl.float32), 0.0)
    gain = gl.load(gain_ptr + n).to(gl.float32)
    gl.store(residual_ptr + at, rounded, mask=present)
    gl.store(scaled_ptr + at, (wide * gain[:, None]).to(scaled_ptr.dtype.element_ty), mask=present)
    gl.store(squares_ptr + gl.program_id(1) * ROWS + m, gl.sum(wide * wide, axis=0), mask=m < M)


@gluon_jit(do_not_specialize=["M"])
def gate_up_kernel(
    x_ptr, squares_ptr, w_ptr, out_ptr, eps, M,
    BM: gl.constexpr, INNER: gl.constexpr, K: gl.constexpr, R: gl.constexpr, BK: gl.constexpr, DEPTH: gl.constexpr,
    WARPS: gl.constexpr, PARTS: gl.constexpr, ROWS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    E: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [1, WARPS], [0, 1])
    first, m0 = gl.program_id(1) * (R // 2), gl.program_id(0) * BM
    product = _product(x_ptr, w_ptr, first, first + INNER, m0, M, K, BM, R, BK, DEPTH, WARPS, True, PDL)
    gate, up = _halves(product, R, BM, E)
    n = first + gl.arange(0, R // 2, layout=gl.SliceLayout(1, E))
    m = m0 + gl.arange(0, BM, layout=gl.SliceLayout(0, E))
    factor = _norm_factor(squares_ptr, m, M, eps, PARTS, K, ROWS, BM, E)[None, :]
    gate = gate * factor
    value = gate / (1.0 + gl.exp(-gate)) * (up * factor)
    gl.store(out_ptr + m[None, :] * INNER + n[:, None], value.to(out_ptr.dtype.element_ty), mask=(m < M)[None, :])


@gluon_jit(do_not_specialize=["M"])
def head_kernel(
    x_ptr, squares_ptr, w_ptr, out_ptr, eps, M,
    BM: gl.constexpr, N: gl.constexpr, K: gl.constexpr, R: gl.constexpr, BK: gl.constexpr, DEPTH: gl.constexpr,
    WARPS: gl.constexpr, PARTS: gl.constexpr, ROWS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    E: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [1, WARPS], [0, 1])
    first, m0 = gl.program_id(1) * R, gl.program_id(0) * BM
    acc = gl.convert_layout(_product(x_ptr, w_ptr, first, first, m0, M, K, BM, R, BK, DEPTH, WARPS, False, PDL), E)
    n = first + gl.arange(0, R, layout=gl.SliceLayout(1, E))
    m = m0 + gl.arange(0, BM, layout=gl.SliceLayout(0, E))
    factor = _norm_factor(squares_ptr, m, M, eps, PARTS, K, ROWS, BM, E)[None, :]
    gl.store(out_ptr + m.to(gl.int64)[None, :] * N + n[:, None], acc * factor, mask=(m < M)[None, :])


@gluon_jit(do_not_specialize=["M"])
def qkv_kernel(
    x_ptr, squares_ptr, w_ptr, bias_ptr, cos_sin_ptr, rows_ptr, position_ptr, table_ptr, q_ptr, k_ptr, v_ptr,
    eps, table_row, k_page, k_slot, k_head, v_page, v_slot, v_head, M,
    BM: gl.constexpr, K: gl.constexpr, D: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr,
    R: gl.constexpr, BK: gl.constexpr, DEPTH: gl.constexpr, WARPS: gl.constexpr, PAGE: gl.constexpr,
    BIAS: gl.constexpr, PARTS: gl.constexpr, ROWS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    E: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [1, WARPS], [0, 1])
    HALF: gl.constexpr = D // 2
    pair = gl.program_id(1) * (R // 2)
    head = pair // HALF  # R / 2 divides HALF: a program stays inside one head
    inside = pair % HALF
    first, m0 = head * D + inside, gl.program_id(0) * BM
    product = _product(x_ptr, w_ptr, first, first + HALF, m0, M, K, BM, R, BK, DEPTH, WARPS, True, PDL)
    a, b = _halves(product, R, BM, E)
    j = gl.arange(0, R // 2, layout=gl.SliceLayout(1, E))
    d = (inside + j)[:, None]
    m = m0 + gl.arange(0, BM, layout=gl.SliceLayout(0, E))
    present = (m < M)[None, :]
    slot = gl.load(rows_ptr + m, mask=m < M, other=0)
    position = gl.load(position_ptr + slot, mask=m < M, other=0)
    page = gl.load(table_ptr + slot * table_row + position // PAGE, mask=m < M, other=0).to(gl.int64)[None, :]
    offset = (position % PAGE)[None, :]
    turned = present & (head < HEADS + KV_HEADS)
    cos = gl.load(cos_sin_ptr + position[None, :] * D + d, mask=turned, other=1.0)
    sin = gl.load(cos_sin_ptr + position[None, :] * D + HALF + d, mask=turned, other=0.0)
    factor = _norm_factor(squares_ptr, m, M, eps, PARTS, K, ROWS, BM, E)[None, :]
    a = a * factor
    b = b * factor
    if BIAS:
        a += gl.load(bias_ptr + first + j).to(gl.float32)[:, None]
        b += gl.load(bias_ptr + first + HALF + j).to(gl.float32)[:, None]
    low = (a * cos - b * sin).to(q_ptr.dtype.element_ty)
    high = (b * cos + a * sin).to(q_ptr.dtype.element_ty)
    if head < HEADS:
        at = q_ptr + (m[None, :] * HEADS + head) * D + d
        gl.store(at, low, mask=present)
        gl.store(at + HALF, high, mask=present)
    elif head < HEADS + KV_HEADS:
        at = k_ptr + page * k_page + offset * k_slot + (head - HEADS) * k_head + d
        gl.store(at, low, mask=present)
        gl.store(at + HALF, high, mask=present)
    else:
        at = v_ptr + page * v_page + offset * v_slot + (head - HEADS - KV_HEADS) * v_head + d
        gl.store(at, low, mask=present)
        gl.store(at + HALF, high, mask=present)
