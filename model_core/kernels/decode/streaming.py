"""The tile kernels a third time, for 8 to 128 rows on Hopper: weights stream through shared memory by TMA into wgmma.

A program multiplies `rows` rows of W (a multiple of 64, wgmma's height) by all rows of x. One thread asks for whole tiles
(TMA), so that no warp spends its time on addresses, and the first `stages` tiles of W are asked for before the launch's wait:
they arrive while the kernel before still runs. Where rows of W are too few for all multiprocessors, `splits` programs share K;
the last to arrive adds their parts in order. The kernels take the arguments of their Triton twins in qkv.py, project.py,
gate_up.py and head.py, which are their references and what runs elsewhere; their epilogues are those of registers.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

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
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


@dataclass(frozen=True)
class StreamTiles:
    """rows: rows of W per program (of each half where there are pairs), a multiple of 64, or 32 of each half of gate and up;
    splits: programs along K; warps: 4 or 8; stages: tiles in flight; chunk: columns of a tile, a multiple of 64 (a panel of 128
    bytes, what TMA swizzles)."""

    rows: int
    splits: int
    warps: int
    stages: int
    chunk: int = 64

    def divides(self, width: int) -> bool:
        """Whether K = width columns fall into whole tiles, at least `stages` for every split: none may be asked for in vain."""
        turns = width // self.chunk
        if width % self.chunk:
            return False
        return turns - (self.splits - 1) * cdiv(turns, self.splits) >= self.stages

    def grid(self, out_rows: int, count: int) -> tuple[int, int, int]:
        assert out_rows % self.rows == 0, (out_rows, self)
        return cdiv(count, columns(count)), out_rows // self.rows, self.splits

    def options(self, count: int, **more: Any) -> dict[str, Any]:
        return dict(BM=columns(count), R=self.rows, SPLITS=self.splits, STAGES=self.stages, num_warps=self.warps, **more)


def descriptors(weight: torch.Tensor, x: torch.Tensor, tiles: StreamTiles) -> tuple[Any, Any]:
    """What TMA must know of W [N, K] and x [M, K]; rows of x past M read as zeros."""
    found = []
    chunk = tiles.chunk if tiles.rows >= 64 else 64  # of W: two halves are one tile where they meet in each of its panels
    for tensor, block in ((weight, [tiles.rows, chunk]), (x, [columns(x.shape[0]), tiles.chunk])):
        layout = gl.NVMMASharedLayout.get_default_for(block, _element(tensor.dtype))
        found.append(TensorDescriptor.from_tensor(tensor, block, layout))
    return found[0], found[1]


def _element(dtype: torch.dtype) -> Any:
    return {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]


@gluon_jit
def _ask_w(w_desc, ws, bar, first, other, at, stage, PANELS: gl.constexpr, PAIR: gl.constexpr, more=True):
    """Columns `at`.. of both halves, into the buffers of a stage: panel by panel, in each the halves one behind the other."""
    PAIRS: gl.constexpr = 2 if PAIR else 1
    for panel in gl.static_range(PANELS):
        to, column = (stage * PANELS + panel) * PAIRS, at + panel * w_desc.block_type.shape[1]
        tma.async_copy_global_to_shared(w_desc, [first, column], bar, ws.index(to), pred=more)
        if PAIR:
            tma.async_copy_global_to_shared(w_desc, [other, column], bar, ws.index(to + 1), pred=more)


@gluon_jit
def _begin(
    w_desc, x_desc, first, other, split,
    K: gl.constexpr, BM: gl.constexpr, R: gl.constexpr, SPLITS: gl.constexpr, STAGES: gl.constexpr, PAIR: gl.constexpr,
):  # fmt: skip
    """Buffers, and the first STAGES tiles of W on their way into them."""
    BK: gl.constexpr = x_desc.block_type.shape[1]
    PANELS: gl.constexpr = BK // w_desc.block_type.shape[1]
    SHARE: gl.constexpr = (K + SPLITS * BK - 1) // (SPLITS * BK)
    PAIRS: gl.constexpr = 2 if PAIR else 1
    ws = gl.allocate_shared_memory(w_desc.dtype, [STAGES * PAIRS * PANELS, R, BK // PANELS], w_desc.layout)
    xs = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BM, BK], x_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(bars.index(s), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.expect(bars.index(s), (R * PAIRS + BM) * BK * 2)
        _ask_w(w_desc, ws, bars.index(s), first, other, (split * SHARE + s) * BK, s, PANELS, PAIR)
    return ws, xs, bars


@gluon_jit
def _ask_x(x_desc, xs, bars, m0, split, K: gl.constexpr, SPLITS: gl.constexpr, STAGES: gl.constexpr):
    """After the wait: the tiles of x that belong to them."""
    BK: gl.constexpr = x_desc.block_type.shape[1]
    SHARE: gl.constexpr = (K + SPLITS * BK - 1) // (SPLITS * BK)
    for s in gl.static_range(STAGES):
        tma.async_copy_global_to_shared(x_desc, [m0, (split * SHARE + s) * BK], bars.index(s), xs.index(s))


@gluon_jit
def _product(
    w_desc, x_desc, ws, xs, bars, first, other, m0, split, E: gl.constexpr,
    K: gl.constexpr, BM: gl.constexpr, R: gl.constexpr, SPLITS: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
    PAIR: gl.constexpr,
):  # fmt: skip
    """(W[first..] @ x.T, W[other..] @ x.T if PAIR) over this split's share of K, float32 [R, BM] in layout E."""
    BK: gl.constexpr = x_desc.block_type.shape[1]
    PANELS: gl.constexpr = BK // w_desc.block_type.shape[1]
    SHARE: gl.constexpr = (K + SPLITS * BK - 1) // (SPLITS * BK)
    PAIRS: gl.constexpr = 2 if PAIR else 1
    JOINT: gl.constexpr = R < 64  # both halves in one tile of wgmma's height
    HIGH: gl.constexpr = 8 if R >= 128 and WARPS == 8 else 4  # warps along rows of W
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [HIGH, WARPS // HIGH], [16, BM * HIGH // WARPS, 16])
    begin = split * SHARE
    turns = gl.minimum(SHARE, K // BK - begin)
    acc = gl.zeros([2 * R if JOINT else R, BM], gl.float32, layout=MMA)
    acc2 = acc
    whole = ws._reinterpret(w_desc.dtype, [STAGES, 2 * R, BK], w_desc.layout) if JOINT else ws
    for turn in range(turns):
        stage = turn % STAGES
        mbarrier.wait(bars.index(stage), (turn // STAGES) & 1)
        xt = xs.index(stage).permute((1, 0))
        if JOINT:
            one = warpgroup_mma(whole.index(stage), xt, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(one,))
        elif PAIR:
            one = warpgroup_mma(ws.index(stage * PAIRS), xt, acc, is_async=True)
            two = warpgroup_mma(ws.index(stage * PAIRS + 1), xt, acc2, is_async=True)
            acc, acc2 = warpgroup_mma_wait(0, deps=(one, two))
        else:
            one = warpgroup_mma(ws.index(stage * PAIRS), xt, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(one,))
        more = turn + STAGES < turns
        at = (begin + turn + STAGES) * BK
        mbarrier.expect(bars.index(stage), (R * PAIRS + BM) * BK * 2, pred=more)
        _ask_w(w_desc, ws, bars.index(stage), first, other, at, stage, PANELS, PAIR, more)
        tma.async_copy_global_to_shared(x_desc, [m0, at], bars.index(stage), xs.index(stage), pred=more)
    for s in gl.static_range(STAGES):
        mbarrier.invalidate(bars.index(s))
    if JOINT:
        acc, acc2 = _halves(gl.convert_layout(acc, E), E, R, BM)
    return gl.convert_layout(acc, E), gl.convert_layout(acc2, E)


@gluon_jit
def _halves(value, E: gl.constexpr, HALF: gl.constexpr, BM: gl.constexpr):
    """[2 HALF, BM] -> its upper and its lower rows. Where E has 32 threads along the rows, partners are in one thread."""
    low, high = gl.split(value.reshape([2, HALF, BM]).permute([1, 2, 0]))
    return gl.convert_layout(low, E), gl.convert_layout(high, E)


@gluon_jit
def _add_splits(
    acc, acc2, part_ptr, arrived_ptr, split, E: gl.constexpr, BM: gl.constexpr, R: gl.constexpr, SPLITS: gl.constexpr,
    PAIR: gl.constexpr,
):  # fmt: skip
    """tiles.add_splits, in Gluon."""
    last = True
    if SPLITS > 1:
        tile = gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)
        SIZE: gl.constexpr = R * BM * (2 if PAIR else 1)
        r = gl.arange(0, R, layout=gl.SliceLayout(1, E))
        m = gl.arange(0, BM, layout=gl.SliceLayout(0, E))
        inside = m[None, :] * R + r[:, None]  # neighbours of E are neighbours in memory
        base = part_ptr + (tile * SPLITS).to(gl.int64) * SIZE
        gl.store(base + split * SIZE + inside, acc)
        if PAIR:
            gl.store(base + split * SIZE + R * BM + inside, acc2)
        gl.thread_barrier()
        last = gl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == SPLITS - 1
        if last:
            gl.thread_barrier()
            acc = gl.zeros([R, BM], gl.float32, layout=E)
            acc2 = gl.zeros([R, BM], gl.float32, layout=E)
            for s in gl.static_range(SPLITS):
                acc += gl.load(base + s * SIZE + inside, cache_modifier=".cg")
                if PAIR:
                    acc2 += gl.load(base + s * SIZE + R * BM + inside, cache_modifier=".cg")
            gl.store(arrived_ptr + tile, 0)
    return acc, acc2, last


@gluon_jit(do_not_specialize=["M"])
def project_kernel(
    x_desc, w_desc, gain_ptr, residual_ptr, scaled_ptr, squares_ptr, part_ptr, arrived_ptr, M,
    BM: gl.constexpr, N: gl.constexpr, K: gl.constexpr, R: gl.constexpr, SPLITS: gl.constexpr, STAGES: gl.constexpr,
    ROWS: gl.constexpr, PDL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    E: gl.constexpr = gl.BlockedLayout([R // 32, 1], [32, 1], [1, num_warps], [0, 1])
    m0, first, split = gl.program_id(0) * BM, gl.program_id(1) * R, gl.program_id(2)
    ws, xs, bars = _begin(w_desc, x_desc, first, first, split, K, BM, R, SPLITS, STAGES, False)
    n = first + gl.arange(0, R, layout=gl.SliceLayout(1, E))
    m = m0 + gl.arange(0, BM, layout=gl.SliceLayout(0, E))
    gain = gl.load(gain_ptr + n)
    follow(PDL)
    _ask_x(x_desc, xs, bars, m0, split, K, SPLITS, STAGES)
    base = gl.load(residual_ptr + m[None, :] * N + n[:, None], mask=(m < M)[None, :], other=0.0)
    acc, acc2 = _product(w_desc, x_desc, ws, xs, bars, first, first, m0, split, E, K, BM, R, SPLITS, STAGES, num_warps, False)
    acc, acc2, last = _add_splits(acc, acc2, part_ptr, arrived_ptr, split, E, BM, R, SPLITS, False)
    if last:
        finish_project(acc, base, gain, n, m, gl.program_id(1), residual_ptr, scaled_ptr, squares_ptr, M, N, ROWS)


@gluon_jit(do_not_specialize=["M"])
def gate_up_kernel(
    x_desc, squares_ptr, w_desc, out_ptr, part_ptr, arrived_ptr, eps, M,
    BM: gl.constexpr, INNER: gl.constexpr, K: gl.constexpr, R: gl.constexpr, SPLITS: gl.constexpr, STAGES: gl.constexpr,
    PARTS: gl.constexpr, ALL: gl.constexpr, ROWS: gl.constexpr, PDL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    E: gl.constexpr = gl.BlockedLayout([R // 32, 1], [32, 1], [1, num_warps], [0, 1])
    m0, first, split = gl.program_id(0) * BM, gl.program_id(1) * R, gl.program_id(2)
    ws, xs, bars = _begin(w_desc, x_desc, first, first + INNER, split, K, BM, R, SPLITS, STAGES, True)
    n = first + gl.arange(0, R, layout=gl.SliceLayout(1, E))
    m = m0 + gl.arange(0, BM, layout=gl.SliceLayout(0, E))
    follow(PDL)
    _ask_x(x_desc, xs, bars, m0, split, K, SPLITS, STAGES)
    squares = squares_of(squares_ptr, m, M, PARTS, ROWS, ALL, E)
    gate, up = _product(w_desc, x_desc, ws, xs, bars, first, first + INNER, m0, split, E, K, BM, R, SPLITS, STAGES, num_warps,
                        True)  # fmt: skip
    gate, up, last = _add_splits(gate, up, part_ptr, arrived_ptr, split, E, BM, R, SPLITS, True)
    if last:
        finish_gate_up(gate, up, squares, n, m, out_ptr, eps, M, INNER, K)


@gluon_jit(do_not_specialize=["M"])
def head_kernel(
    x_desc, squares_ptr, w_desc, out_ptr, eps, M,
    BM: gl.constexpr, N: gl.constexpr, K: gl.constexpr, R: gl.constexpr, SPLITS: gl.constexpr, STAGES: gl.constexpr,
    PARTS: gl.constexpr, ALL: gl.constexpr, ROWS: gl.constexpr, PDL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    E: gl.constexpr = gl.BlockedLayout([R // 32, 1], [32, 1], [1, num_warps], [0, 1])
    m0, first, split = gl.program_id(0) * BM, gl.program_id(1) * R, gl.program_id(2)
    ws, xs, bars = _begin(w_desc, x_desc, first, first, split, K, BM, R, SPLITS, STAGES, False)
    n = first + gl.arange(0, R, layout=gl.SliceLayout(1, E))
    m = m0 + gl.arange(0, BM, layout=gl.SliceLayout(0, E))
    follow(PDL)
    _ask_x(x_desc, xs, bars, m0, split, K, SPLITS, STAGES)
    squares = squares_of(squares_ptr, m, M, PARTS, ROWS, ALL, E)
    acc, _ = _product(w_desc, x_desc, ws, xs, bars, first, first, m0, split, E, K, BM, R, SPLITS, STAGES, num_warps, False)
    finish_head(acc, squares, n, m, out_ptr, eps, M, N, K)


@gluon_jit(do_not_specialize=["M"])
def qkv_kernel(
    x_desc, squares_ptr, w_desc, bias_ptr, cos_sin_ptr, rows_ptr, position_ptr, table_ptr, q_ptr, k_ptr, v_ptr,
    part_ptr, arrived_ptr, eps, table_row, k_page, k_slot, k_head, v_page, v_slot, v_head, M,
    BM: gl.constexpr, K: gl.constexpr, D: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr,
    R: gl.constexpr, SPLITS: gl.constexpr, STAGES: gl.constexpr, PAGE: gl.constexpr, BIAS: gl.constexpr,
    PARTS: gl.constexpr, ALL: gl.constexpr, ROWS: gl.constexpr, PDL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    # R is D: a program has one head, and with 32 threads along its rows both partners of a rotation are in one thread
    E: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [1, num_warps], [0, 1])
    HALF: gl.constexpr = D // 2
    m0, head, split = gl.program_id(0) * BM, gl.program_id(1), gl.program_id(2)
    ws, xs, bars = _begin(w_desc, x_desc, head * D, head * D, split, K, BM, R, SPLITS, STAGES, False)
    d = gl.arange(0, HALF, layout=gl.SliceLayout(1, E))
    m = m0 + gl.arange(0, BM, layout=gl.SliceLayout(0, E))
    page, offset, cos, sin = place(d, m, head, M, cos_sin_ptr, rows_ptr, position_ptr, table_ptr, table_row, D, HEADS, KV_HEADS,
                                   PAGE)  # fmt: skip
    bias_a = d
    bias_b = d
    if BIAS:
        bias_a, bias_b = gl.load(bias_ptr + head * D + d), gl.load(bias_ptr + head * D + HALF + d)
    follow(PDL)
    _ask_x(x_desc, xs, bars, m0, split, K, SPLITS, STAGES)
    squares = squares_of(squares_ptr, m, M, PARTS, ROWS, ALL, E)
    acc, acc2 = _product(w_desc, x_desc, ws, xs, bars, head * D, head * D, m0, split, E, K, BM, R, SPLITS, STAGES, num_warps,
                         False)  # fmt: skip
    acc, acc2, last = _add_splits(acc, acc2, part_ptr, arrived_ptr, split, E, BM, R, SPLITS, False)
    if last:
        a, b = _halves(acc, E, HALF, BM)
        finish_qkv(a, b, squares, bias_a, bias_b, page, offset, cos, sin, d, m, head, q_ptr, k_ptr, v_ptr, eps, k_page, k_slot,
                   k_head, v_page, v_slot, v_head, M, K, D, HEADS, KV_HEADS, BIAS)  # fmt: skip
