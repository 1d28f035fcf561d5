"""The tile kernels once more, for up to 16 rows: weights go from memory straight into the registers that the tensor cores read,
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

from model_core.kernels.decode.epilogues import (
    finish_gate_up,
    finish_head,
    finish_project,
    finish_qkv,
    follow,
    place,
    squares_of,
)
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
def _weights(
    w_ptr, first, other,
    K: gl.constexpr, R: gl.constexpr, BK: gl.constexpr, DEPTH: gl.constexpr, WARPS: gl.constexpr, PAIR: gl.constexpr,
):  # fmt: skip
    """The first DEPTH steps of W rows first.. [R], on their way; and the address of the first.

    If PAIR, of each 16 rows 8 are from first.. and 8 from other.., so that partners end up in one thread.
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 8)
    r = gl.arange(0, R, layout=gl.SliceLayout(0, gl.SliceLayout(2, A)))
    n = gl.where(r % 16 < 8, first, other) + r // 16 * 8 + r % 8 if PAIR else first + r
    share = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, A))) * (K // WARPS)
    k = gl.arange(0, BK, layout=gl.SliceLayout(0, gl.SliceLayout(1, A)))
    at = w_ptr + n.to(gl.int64)[None, :, None] * K + share[:, None, None] + k[None, None, :]
    w = ()
    for c in gl.static_range(DEPTH):
        w = w + (gl.load(at + c * BK, eviction_policy="evict_first"),)  # type: ignore[assignment]
    return w, at


@gluon_jit
def _product(
    w, at, x_ptr, m0, M,
    K: gl.constexpr, BM: gl.constexpr, R: gl.constexpr, BK: gl.constexpr, DEPTH: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Those rows of W times x rows m0.. [BM], float32 [R, BM]."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 8)
    SHARE: gl.constexpr = K // WARPS
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


@gluon_jit(do_not_specialize=["M"])
def project_kernel(
    x_ptr, w_ptr, gain_ptr, residual_ptr, scaled_ptr, squares_ptr, M,
    BM: gl.constexpr, N: gl.constexpr, K: gl.constexpr, R: gl.constexpr, BK: gl.constexpr, DEPTH: gl.constexpr,
    WARPS: gl.constexpr, ROWS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    E: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [1, WARPS], [0, 1])
    first, m0 = gl.program_id(1) * R, gl.program_id(0) * BM
    w, w_at = _weights(w_ptr, first, first, K, R, BK, DEPTH, WARPS, False)
    n = first + gl.arange(0, R, layout=gl.SliceLayout(1, E))
    m = m0 + gl.arange(0, BM, layout=gl.SliceLayout(0, E))
    gain = gl.load(gain_ptr + n)
    follow(PDL)
    base = gl.load(residual_ptr + m[None, :] * N + n[:, None], mask=(m < M)[None, :], other=0.0)
    acc = gl.convert_layout(_product(w, w_at, x_ptr, m0, M, K, BM, R, BK, DEPTH, WARPS), E)
    finish_project(acc, base, gain, n, m, gl.program_id(1), residual_ptr, scaled_ptr, squares_ptr, M, N, ROWS)


@gluon_jit(do_not_specialize=["M"])
def gate_up_kernel(
    x_ptr, squares_ptr, w_ptr, out_ptr, eps, M,
    BM: gl.constexpr, INNER: gl.constexpr, K: gl.constexpr, R: gl.constexpr, BK: gl.constexpr, DEPTH: gl.constexpr,
    WARPS: gl.constexpr, PARTS: gl.constexpr, ALL: gl.constexpr, ROWS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    E: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [1, WARPS], [0, 1])
    first, m0 = gl.program_id(1) * (R // 2), gl.program_id(0) * BM
    w, w_at = _weights(w_ptr, first, first + INNER, K, R, BK, DEPTH, WARPS, True)
    n = first + gl.arange(0, R // 2, layout=gl.SliceLayout(1, E))
    m = m0 + gl.arange(0, BM, layout=gl.SliceLayout(0, E))
    follow(PDL)
    squares = squares_of(squares_ptr, m, M, PARTS, ROWS, ALL, E)
    gate, up = _halves(_product(w, w_at, x_ptr, m0, M, K, BM, R, BK, DEPTH, WARPS), R, BM, E)
    finish_gate_up(gate, up, squares, n, m, out_ptr, eps, M, INNER, K)


@gluon_jit(do_not_specialize=["M"])
def head_kernel(
    x_ptr, squares_ptr, w_ptr, out_ptr, eps, M,
    BM: gl.constexpr, N: gl.constexpr, K: gl.constexpr, R: gl.constexpr, BK: gl.constexpr, DEPTH: gl.constexpr,
    WARPS: gl.constexpr, PARTS: gl.constexpr, ALL: gl.constexpr, ROWS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    E: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [1, WARPS], [0, 1])
    first, m0 = gl.program_id(1) * R, gl.program_id(0) * BM
    w, w_at = _weights(w_ptr, first, first, K, R, BK, DEPTH, WARPS, False)
    n = first + gl.arange(0, R, layout=gl.SliceLayout(1, E))
    m = m0 + gl.arange(0, BM, layout=gl.SliceLayout(0, E))
    follow(PDL)
    squares = squares_of(squares_ptr, m, M, PARTS, ROWS, ALL, E)
    acc = gl.convert_layout(_product(w, w_at, x_ptr, m0, M, K, BM, R, BK, DEPTH, WARPS), E)
    finish_head(acc, squares, n, m, out_ptr, eps, M, N, K)


@gluon_jit(do_not_specialize=["M"])
def qkv_kernel(
    x_ptr, squares_ptr, w_ptr, bias_ptr, cos_sin_ptr, rows_ptr, position_ptr, table_ptr, q_ptr, k_ptr, v_ptr,
    eps, table_row, k_page, k_slot, k_head, v_page, v_slot, v_head, M,
    BM: gl.constexpr, K: gl.constexpr, D: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr,
    R: gl.constexpr, BK: gl.constexpr, DEPTH: gl.constexpr, WARPS: gl.constexpr, PAGE: gl.constexpr,
    BIAS: gl.constexpr, PARTS: gl.constexpr, ALL: gl.constexpr, ROWS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    E: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [1, WARPS], [0, 1])
    HALF: gl.constexpr = D // 2
    pair = gl.program_id(1) * (R // 2)
    head = pair // HALF  # R / 2 divides HALF: a program stays inside one head
    first, m0 = head * D + pair % HALF, gl.program_id(0) * BM
    w, w_at = _weights(w_ptr, first, first + HALF, K, R, BK, DEPTH, WARPS, True)
    d = pair % HALF + gl.arange(0, R // 2, layout=gl.SliceLayout(1, E))
    m = m0 + gl.arange(0, BM, layout=gl.SliceLayout(0, E))
    page, offset, cos, sin = place(d, m, head, M, cos_sin_ptr, rows_ptr, position_ptr, table_ptr, table_row, D, HEADS, KV_HEADS,
                                   PAGE)  # fmt: skip
    bias_a = d
    bias_b = d
    if BIAS:
        bias_a, bias_b = gl.load(bias_ptr + head * D + d), gl.load(bias_ptr + head * D + HALF + d)
    follow(PDL)
    squares = squares_of(squares_ptr, m, M, PARTS, ROWS, ALL, E)
    a, b = _halves(_product(w, w_at, x_ptr, m0, M, K, BM, R, BK, DEPTH, WARPS), R, BM, E)
    finish_qkv(a, b, squares, bias_a, bias_b, page, offset, cos, sin, d, m, head, q_ptr, k_ptr, v_ptr, eps, k_page, k_slot,
               k_head, v_page, v_slot, v_head, M, K, D, HEADS, KV_HEADS, BIAS)  # fmt: skip
