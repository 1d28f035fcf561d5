"""Shared by the decode kernels for more than a few rows: W tiles times x tiles on the tensor cores.

The product is transposed: acc [BN, BM] = W tile [BN, BK] @ x tile [BK, BM], so that the weights are the wide operand and
a batch of 8 needs no padding. SPLITS programs may share a tile's K (few rows of W, many multiprocessors); the last
to arrive adds their parts in order, so the sum does not depend on who was last.

RMSNorm costs no pass of its own here. Who writes the residual stream also writes it times the gain of the norm that comes
next, and sums of squares per tile of columns; who reads it multiplies the plain product by 1 / rms at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from model_core.kernels.runtime import cdiv, jit, next_power_of_2, tl


@dataclass(frozen=True)
class TensorTiles:
    """rows: rows of W per program (of each half where a program has pairs); chunk: columns per loop turn; splits: programs
    along K; warps; stages: loads in flight. Programs take up to 128 rows of x."""

    rows: int
    chunk: int
    splits: int
    warps: int
    stages: int

    def grid(self, out_rows: int, count: int) -> tuple[int, int, int]:
        """Programs for `count` rows of x and `out_rows` rows of W (of each half). Those that share W run side by side."""
        assert out_rows % self.rows == 0, (out_rows, self)
        return cdiv(count, columns(count)), out_rows // self.rows, self.splits

    def options(self, count: int, **more: Any) -> dict[str, Any]:
        """What every tile kernel is specialised on, for `count` rows of x: the width of its accumulator, not `count`."""
        return dict(BM=columns(count), R=self.rows, BK=self.chunk, SPLITS=self.splits, STAGES=self.stages,
                    num_warps=self.warps, **more)  # fmt: skip


def columns(rows: int) -> int:
    """Columns of an accumulator for that many rows of x: at least 8 (one tensor-core instruction's width)."""
    return min(128, max(8, next_power_of_2(rows)))


@jit
def fetch_ahead(w_ptr, n, split, K: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr):
    """Ask for the beginning of this program's share of rows n [BN] of W to be brought into L2.

    Before the wait of a chained launch this overlaps with the kernel before. (The pipelined loop itself can only start after
    the wait: the compiler would move the loads of x above it.) More than the beginning costs more than it gains: with whole
    shares gate and up of TinyLlama took 19.8 us for 8 rows instead of 18.7 (H100).
    """
    SHARE: tl.constexpr = (K + SPLITS * BK - 1) // (SPLITS * BK) * BK
    column = split * SHARE + tl.arange(0, 4) * 64  # lines of 128 bytes
    at = w_ptr + n.to(tl.int64)[:, None] * K + tl.minimum(column, K - 1)[None, :]
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1)


@jit
def tile_product(
    x_ptr, m, present, w_ptr, n, other_n, split,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, PAIR: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """(W[n] @ x.T, W[other_n] @ x.T if PAIR) over this split's share of K, float32 [BN, BM].

    x [.., K] at rows m [BM] where `present`; n, other_n [BN]: rows of W.
    """
    SHARE: tl.constexpr = (K + SPLITS * BK - 1) // (SPLITS * BK) * BK
    k0 = tl.arange(0, BK)
    acc = tl.zeros([BN, BM], tl.float32)
    other = tl.zeros([BN, BM], tl.float32)
    begin = split * SHARE
    x_at = x_ptr + m[None, :] * K + k0[:, None]
    w_at = w_ptr + n.to(tl.int64)[:, None] * K + k0[None, :]
    other_at = w_ptr + other_n.to(tl.int64)[:, None] * K + k0[None, :]
    for turn in tl.range(0, SHARE // BK, num_stages=STAGES):
        start = begin + turn * BK
        if K % BK == 0 and K % SHARE == 0:
            w = tl.load(w_at + start)
            x = tl.load(x_at + start, mask=present[None, :], other=0.0)
            if PAIR:
                w2 = tl.load(other_at + start)
        else:
            inside = start + k0 < K
            w = tl.load(w_at + start, mask=inside[None, :], other=0.0)
            x = tl.load(x_at + start, mask=present[None, :] & inside[:, None], other=0.0)
            if PAIR:
                w2 = tl.load(other_at + start, mask=inside[None, :], other=0.0)
        acc = tl.dot(w, x, acc, input_precision="ieee")
        if PAIR:
            other = tl.dot(w2, x, other, input_precision="ieee")
    return acc, other


@jit
def add_splits(
    acc, other, part_ptr, arrived_ptr, split, BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr, PAIR: tl.constexpr
):
    """The sums over all splits, and whether this program is the one that has them (True without splits)."""
    if SPLITS == 1:
        return acc, other, True
    tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    SIZE: tl.constexpr = BN * BM * (2 if PAIR else 1)
    inside = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
    base = part_ptr + (tile * SPLITS).to(tl.int64) * SIZE
    mine = base + split * SIZE
    tl.store(mine + inside, acc)
    if PAIR:
        tl.store(mine + BN * BM + inside, other)
    tl.debug_barrier()  # triton 3.6 orders only thread 0's stores before its atomic (kernels.md 3)
    last = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == SPLITS - 1
    if last:
        tl.debug_barrier()
        acc = tl.zeros([BN, BM], tl.float32)
        other = tl.zeros([BN, BM], tl.float32)
        for s in tl.static_range(SPLITS):
            acc += tl.load(base + s * SIZE + inside, cache_modifier=".cg")
            if PAIR:
                other += tl.load(base + s * SIZE + BN * BM + inside, cache_modifier=".cg")
        tl.store(arrived_ptr + tile, 0)
    return acc, other, last


@jit
def norm_factor(squares_ptr, row, present, eps, PARTS: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr):
    """1 / rms [BM] of rows `row` [BM] of the residual stream, from its PARTS sums of squares a row, added in fixed order."""
    STEP: tl.constexpr = 8
    total = tl.zeros(row.shape, tl.float32)
    for first in tl.static_range(0, PARTS, STEP):
        part = first + tl.arange(0, STEP)
        at = squares_ptr + part[:, None] * ROWS + row[None, :]
        total += tl.sum(tl.load(at, mask=(part < PARTS)[:, None] & present[None, :], other=0.0), axis=0)
    return tl.rsqrt(total / H + eps)


class TileSpace:
    """Parts of split products, shared by all kernels of a chain (each has read them before the next writes).

    Launches overlap only up to the wait that every kernel begins with, so one buffer is enough.
    """

    def __init__(self, floats: int, tiles: int, device: torch.device | str) -> None:
        self.part = torch.empty(max(1, floats), dtype=torch.float32, device=device)
        self.arrived = torch.zeros(max(1, tiles), dtype=torch.int32, device=device)

    @staticmethod
    def needs(out_rows: int, count: int, tiles: Any, *, pair: bool) -> tuple[int, int]:
        """(floats, tiles) of a product of `out_rows` rows of W (of each half) for `count` rows of x."""
        if tiles.splits == 1:
            return 0, 0
        across, along, splits = tiles.grid(out_rows, count)
        return across * along * splits * tiles.rows * columns(count) * (2 if pair else 1), across * along


class Stream:
    """The residual stream of `rows` rows as the tile kernels hand it on.

    residual [rows, H]: the sums. scaled [rows, H]: residual times the gain of the next norm, not divided by its rms.
    squares float32 [parts, rows]: sums of squares of residual per tile of columns; the first `parts`, as the last writer says.
    """

    def __init__(self, rows: int, hidden: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.residual = torch.empty((rows, hidden), dtype=dtype, device=device)
        self.scaled = torch.empty((rows, hidden), dtype=dtype, device=device)
        self.squares = torch.zeros((cdiv(hidden, 16), rows), dtype=torch.float32, device=device)
        self.parts = 0

    @property
    def rows(self) -> int:
        return self.residual.shape[0]


def part_width(hidden: int) -> int:
    """Columns per part where the writer may choose: the largest power of two up to 512 that divides the hidden size."""
    return min(512, hidden & -hidden)


@jit
def write_stream(
    value, m, n, part, present, residual_ptr, scaled_ptr, squares_ptr, gain_ptr, H: tl.constexpr, ROWS: tl.constexpr
):
    """Store float32 `value` [BN, BM] (columns n, rows m of the stream) as all three parts of a Stream."""
    rounded = value.to(residual_ptr.dtype.element_ty)
    wide = tl.where(present[None, :], rounded.to(tl.float32), 0.0)
    gain = tl.load(gain_ptr + n).to(tl.float32)
    at = m[None, :] * H + n[:, None]
    tl.store(residual_ptr + at, rounded, mask=present[None, :])
    tl.store(scaled_ptr + at, (wide * gain[:, None]).to(scaled_ptr.dtype.element_ty), mask=present[None, :])
    tl.store(squares_ptr + part * ROWS + m, tl.sum(wide * wide, axis=0), mask=present)
