"""Shared by the decode kernels for more than a few rows: W tiles times x tiles on the tensor cores.

The product is transposed: acc [BN, BM] = W tile [BN, BK] @ x tile [BK, BM], so that the weights are the wide operand and
a batch of 8 needs no padding. SPLITS programs may share a tile's K (few rows of W, many multiprocessors); the last
to arrive adds their parts in order, so the sum does not depend on who was last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model_core.kernels.runtime import cdiv, jit, next_power_of_2, tl


@dataclass(frozen=True)
class TensorTiles:
    """rows: rows of W per program (of each half where a program has pairs); chunk: columns per loop turn; splits: programs
    along K; warps; stages: loads in flight."""

    rows: int
    chunk: int
    splits: int
    warps: int
    stages: int


def columns(rows: int) -> int:
    """Columns of the accumulator for that many rows of x: at least 8 (one tensor-core instruction's width)."""
    return max(8, next_power_of_2(rows))


@jit
def tile_product(
    x_ptr, x_row, present, w_ptr, n, other_n, gain_ptr, split,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, NORM: tl.constexpr,
    PAIR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(W[n] @ x.T, W[other_n] @ x.T if PAIR, sums of squares of x) over this split's share of K, float32.

    x_row [BM]: rows of x, used where `present`; n, other_n [BN]: rows of W.
    """
    SHARE: tl.constexpr = (K + SPLITS * BK - 1) // (SPLITS * BK) * BK
    k0 = tl.arange(0, BK)
    acc = tl.zeros([BN, BM], tl.float32)
    other = tl.zeros([BN, BM], tl.float32)
    squares = tl.zeros([BM], tl.float32)
    begin = split * SHARE
    x_at = x_ptr + x_row.to(tl.int64)[None, :] * K + k0[:, None]
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
        if NORM:
            gain = tl.load(gain_ptr + start + k0, mask=start + k0 < K, other=0.0).to(tl.float32)
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, axis=0)
            x = (wide * gain[:, None]).to(w.dtype)
        acc = tl.dot(w, x, acc, input_precision="ieee")
        if PAIR:
            other = tl.dot(w2, x, other, input_precision="ieee")
    return acc, other, squares


@jit
def add_splits(
    acc, other, squares, part_ptr, arrived_ptr, tile, split, BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr,
    NORM: tl.constexpr, PAIR: tl.constexpr,
):
    """The sums over all splits, and whether this program is the one that has them (True without splits)."""
    if SPLITS == 1:
        return acc, other, squares, True
    SIZE: tl.constexpr = BN * BM * (2 if PAIR else 1) + BM
    inside = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
    base = part_ptr + (tile * SPLITS).to(tl.int64) * SIZE
    mine = base + split * SIZE
    tl.store(mine + inside, acc)
    if PAIR:
        tl.store(mine + BN * BM + inside, other)
    if NORM:
        tl.store(mine + SIZE - BM + tl.arange(0, BM), squares)
    tl.debug_barrier()  # triton 3.6 orders only thread 0's stores before its atomic (kernels.md 3)
    last = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == SPLITS - 1
    if last:
        tl.debug_barrier()
        acc = tl.zeros([BN, BM], tl.float32)
        other = tl.zeros([BN, BM], tl.float32)
        squares = tl.zeros([BM], tl.float32)
        for s in tl.static_range(SPLITS):
            acc += tl.load(base + s * SIZE + inside, cache_modifier=".cg")
            if PAIR:
                other += tl.load(base + s * SIZE + BN * BM + inside, cache_modifier=".cg")
            if NORM:
                squares += tl.load(base + s * SIZE + SIZE - BM + tl.arange(0, BM), cache_modifier=".cg")
        tl.store(arrived_ptr + tile, 0)
    return acc, other, squares, last


class TileSpace:
    """Parts of split products, shared by all kernels of a chain (each has read them before the next writes).

    Launches overlap only up to the wait that every kernel begins with, so one buffer is enough.
    """

    def __init__(self, floats: int, tiles: int, device: torch.device | str) -> None:
        self.part = torch.empty(max(1, floats), dtype=torch.float32, device=device)
        self.arrived = torch.zeros(max(1, tiles), dtype=torch.int32, device=device)

    @staticmethod
    def floats(out_rows: int, columns: int, tiles: TensorTiles, *, pair: bool) -> int:
        """What a product of `out_rows` rows of W (of each half) for `columns` rows of x needs."""
        if tiles.splits == 1:
            return 0
        size = tiles.rows * columns * (2 if pair else 1) + columns
        return cdiv(out_rows, tiles.rows) * tiles.splits * size
