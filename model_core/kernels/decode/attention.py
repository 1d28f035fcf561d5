"""Decode kernel 2 of a layer: one query token per row over its pages, split over the context, combined in the kernel.

Programs (KV head, split, row) each fold a share of the keys into an online softmax (Milakov and Gimelshein 2018, arXiv
1805.02867; Flash-Decoding, Dao et al. 2023). The last program of a (row, KV head) to arrive adds the parts in split order,
so the result does not depend on who was last, and no second launch is needed. The query heads that share a KV head are the
rows of one tile. How many keys a program takes depends on its row's own context only, never on the batch: `split` keys, or
as many times that as bring a long context down to MAX_SPLITS programs.

Keys and values of earlier steps are no work of this chain: the first of them may be asked for before the launch's wait. Few
rows gain from it (32 rows of TinyLlama: a step of 1,394 us instead of 1,445), many lose. Tried and slower on an H100: fetching
the weights of later kernels into L2 from here, where memory is idle (one row: 971 us a step with 4 MB, 987 with 24 MB, 941
without), and warps that share out the keys, each with a softmax of its own (7.7 us instead of 6.1 for one row).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model_core.kernels.decode.products import announce, launch_options, wait
from model_core.kernels.decode.state import DecodeState
from model_core.kernels.runtime import cdiv, jit, next_power_of_2, tl

MAX_SPLITS = 32
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class SplitTiles:
    """split: keys per program, doubled and more where a context would need over MAX_SPLITS; keys: keys per loop turn; stages of
    the loop's pipeline (each turn takes two: page numbers, then keys and values); first: keys that are asked for before the
    launch's wait, before the loop."""

    split: int
    keys: int
    warps: int
    stages: int
    first: int = 0


@jit
def _kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, part_ptr, stat_ptr, arrived_ptr, rows_ptr, position_ptr, table_ptr, qk_scale,
    table_row, k_page, k_slot, k_head, v_page, v_slot, v_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_ROWS: tl.constexpr,
    PAGE: tl.constexpr, SPLIT: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr,
    STAGES: tl.constexpr, FIRST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = HEADS // KV_HEADS
    kv_head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    announce(PDL)
    # Slots and positions were written by an earlier replay or copy, not by this chain: they may be read before the wait.
    slot = tl.load(rows_ptr + row)
    context = tl.load(position_ptr + slot) + 1
    lowest = tl.maximum(context - WINDOW, 0) if WINDOW > 0 else context * 0
    first = lowest // BLOCK_N * BLOCK_N
    size = SPLIT * tl.cdiv(context - first, SPLIT * SPLITS)
    used = tl.cdiv(context - first, size)
    begin = first + split * size
    end = tl.minimum(begin + size, context)
    d = tl.arange(0, BLOCK_D)
    k_ptr += kv_head * k_head
    v_ptr += kv_head * v_head
    table_ptr += slot * table_row
    newest = context - 1
    if FIRST > 0:  # keys and values of earlier steps, too, may be read before the wait; the newest one's may not
        early = begin + tl.arange(0, FIRST)
        known = (early >= lowest) & (early < end) & (early < newest)
        pages = tl.load(table_ptr + early // PAGE, mask=known, other=0).to(tl.int64)
        k0 = tl.load(k_ptr + (pages * k_page + (early % PAGE) * k_slot)[None, :] + d[:, None],
                     mask=known[None, :] & (d < D)[:, None], other=0.0)  # fmt: skip
        v0 = tl.load(v_ptr + (pages * v_page + (early % PAGE) * v_slot)[:, None] + d[None, :],
                     mask=known[:, None] & (d < D)[None, :], other=0.0)  # fmt: skip
        last_page = tl.load(table_ptr + newest // PAGE).to(tl.int64)
    wait(PDL)
    if split < used:
        g = tl.arange(0, GROUP_ROWS)
        mask = (g < GROUP)[:, None] & (d < D)[None, :]
        at = (row * HEADS + kv_head * GROUP + g)[:, None] * D + d[None, :]
        q = tl.load(q_ptr + at, mask=mask, other=0.0)
        acc = tl.zeros([GROUP_ROWS, BLOCK_D], tl.float32)
        top = tl.full([GROUP_ROWS], float("-inf"), tl.float32)
        norm = tl.zeros([GROUP_ROWS], tl.float32)
        if FIRST > 0:
            here = (newest >= begin) & (newest < tl.minimum(begin + FIRST, end))
            k1 = tl.load(k_ptr + last_page * k_page + (newest % PAGE) * k_slot + d, mask=here & (d < D), other=0.0)
            v1 = tl.load(v_ptr + last_page * v_page + (newest % PAGE) * v_slot + d, mask=here & (d < D), other=0.0)
            score = tl.sum(q.to(tl.float32) * k1.to(tl.float32)[None, :], axis=1)
            score = tl.where(here, score, float("-inf"))
            scores0 = tl.dot(q, k0, input_precision="ieee")
            scores0 = tl.where(known[None, :], scores0, float("-inf"))
            top = tl.maximum(score, tl.max(scores0, axis=1))
            base0 = tl.where(top == float("-inf"), 0.0, top)
            weights0 = tl.exp2(tl.fma(scores0, qk_scale, -(base0 * qk_scale)[:, None]))
            weight = tl.exp2((score - base0) * qk_scale)
            norm = weight + tl.sum(weights0, axis=1)
            acc = weight[:, None] * v1.to(tl.float32)[None, :]
            acc = tl.dot(weights0.to(v0.dtype), v0, acc, input_precision="ieee")
            begin += FIRST
        for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
            n = start + tl.arange(0, BLOCK_N)
            present = (n >= lowest) & (n < end)
            page = tl.load(table_ptr + n // PAGE, mask=present, other=0).to(tl.int64)
            k = tl.load(k_ptr + (page * k_page + (n % PAGE) * k_slot)[None, :] + d[:, None],
                        mask=present[None, :] & (d < D)[:, None], other=0.0)  # fmt: skip
            v = tl.load(v_ptr + (page * v_page + (n % PAGE) * v_slot)[:, None] + d[None, :],
                        mask=present[:, None] & (d < D)[None, :], other=0.0)  # fmt: skip
            scores = tl.dot(q, k, input_precision="ieee")
            scores = tl.where(present[None, :], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.exp2(tl.fma(scores, qk_scale, -(base * qk_scale)[:, None]))
            shrink = tl.exp2((top - base) * qk_scale)
            norm = norm * shrink + tl.sum(weights, axis=1)
            acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
            top = new_top
        if used == 1:
            tl.store(out_ptr + at, (acc / norm[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
        else:
            # part [rows, kv_heads, SPLITS, GROUP, D], stat the same with (top, norm) in place of D
            pair = row * KV_HEADS + kv_head
            part_ptr += (pair * SPLITS).to(tl.int64) * (GROUP * D)
            stat_ptr += pair * SPLITS * GROUP * 2
            inside = g[:, None] * D + d[None, :]
            tl.store(part_ptr + split * GROUP * D + inside, acc, mask=mask)
            tl.store(stat_ptr + (split * GROUP + g) * 2, top, mask=g < GROUP)
            tl.store(stat_ptr + (split * GROUP + g) * 2 + 1, norm, mask=g < GROUP)
            tl.debug_barrier()  # triton 3.6 orders only thread 0's stores before its atomic (kernels.md 3)
            if tl.atomic_add(arrived_ptr + pair, 1, sem="acq_rel") == used - 1:
                tl.debug_barrier()
                s = tl.arange(0, SPLITS)
                stat_at = stat_ptr + (s[:, None] * GROUP + g[None, :]) * 2
                stat_mask = (s < used)[:, None] & (g < GROUP)[None, :]
                tops = tl.load(stat_at, mask=stat_mask, other=float("-inf"), cache_modifier=".cg")
                norms = tl.load(stat_at + 1, mask=stat_mask, other=0.0, cache_modifier=".cg")
                best = tl.max(tops, axis=0)
                safe = tl.where(best == float("-inf"), 0.0, best)
                total = tl.sum(norms * tl.exp2((tops - safe[None, :]) * qk_scale), axis=0)
                acc = tl.zeros([GROUP_ROWS, BLOCK_D], tl.float32)
                for at_split in range(0, used, 4):
                    for lane in tl.static_range(4):  # four parts are on their way at once
                        other = at_split + lane
                        top = tl.load(stat_ptr + (other * GROUP + g) * 2, mask=(g < GROUP) & (other < used),
                                      other=float("-inf"), cache_modifier=".cg")  # fmt: skip
                        part = tl.load(part_ptr + other * GROUP * D + inside, mask=mask & (other < used), other=0.0,
                                       cache_modifier=".cg")  # fmt: skip
                        acc += part * tl.exp2((top - safe) * qk_scale)[:, None]
                tl.store(out_ptr + at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
                tl.store(arrived_ptr + pair, 0)  # ready for the next layer and the next replay


@dataclass
class SplitSpace:
    """Workspace of one chain. `arrived` is zero between launches."""

    part: torch.Tensor  # float32 [rows, kv_heads, MAX_SPLITS, group, D]
    stat: torch.Tensor  # float32 [rows, kv_heads, MAX_SPLITS, group, 2]
    arrived: torch.Tensor  # int32 [rows, kv_heads]

    @classmethod
    def empty(cls, rows: int, heads: int, kv_heads: int, dim: int, device: torch.device | str) -> SplitSpace:
        shape = (rows, kv_heads, MAX_SPLITS, heads // kv_heads)
        return cls(
            part=torch.empty((*shape, dim), dtype=torch.float32, device=device),
            stat=torch.empty((*shape, 2), dtype=torch.float32, device=device),
            arrived=torch.zeros((rows, kv_heads), dtype=torch.int32, device=device),
        )


def attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor, rows: torch.Tensor,
    state: DecodeState, space: SplitSpace, *, scale: float, window: int | None, longest: int,
    tiles: SplitTiles, pdl: bool,
) -> None:  # fmt: skip
    """out [M, Hq, D]: row m attends to positions 0..position[rows[m]] of its slot. `longest` bounds the context."""
    count, heads, dim = q.shape
    kv_heads, page_size = k_cache.shape[2], k_cache.shape[1]
    visible = min(longest, window + tiles.keys) if window else longest
    group = heads // kv_heads
    assert count <= space.part.shape[0] and tiles.split % tiles.keys == 0 and tiles.first <= tiles.split
    _kernel[(kv_heads, min(MAX_SPLITS, cdiv(visible, tiles.split)), count)](
        q, k_cache, v_cache, out, space.part, space.stat, space.arrived, rows, state.position, state.block_tables,
        scale * _LOG2_E, state.block_tables.stride(0), *k_cache.stride()[:3], *v_cache.stride()[:3], HEADS=heads,
        KV_HEADS=kv_heads, D=dim, BLOCK_D=max(16, next_power_of_2(dim)), GROUP_ROWS=max(16, next_power_of_2(group)),
        PAGE=page_size, SPLIT=tiles.split, SPLITS=MAX_SPLITS, BLOCK_N=tiles.keys, WINDOW=window or 0, STAGES=tiles.stages,
        FIRST=tiles.first, PDL=pdl, num_warps=tiles.warps, **launch_options(pdl))  # fmt: skip


def attention_torch(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor, rows: torch.Tensor,
    state: DecodeState, *, scale: float, window: int | None,
) -> None:  # fmt: skip
    """Reference, in float32, row by row."""
    page_size, group = k_cache.shape[1], q.shape[1] // k_cache.shape[2]
    for m, slot in enumerate(rows.tolist()):
        context = int(state.position[slot]) + 1
        first = max(0, context - window) if window else 0
        n = torch.arange(first, context, device=q.device)
        page = state.block_tables[slot, n // page_size].long()
        k, v = (cache[page, n % page_size].float().repeat_interleave(group, 1) for cache in (k_cache, v_cache))
        weights = torch.softmax(torch.einsum("hd,nhd->hn", q[m].float(), k) * scale, -1)
        out[m] = torch.einsum("hn,nhd->hd", weights, v)


def bytes_moved(contexts: list[int], heads: int, kv_heads: int, head_dim: int, element_size: int) -> int:
    """q read and out written per row, every visible key and value once."""
    return 2 * head_dim * element_size * (len(contexts) * heads + sum(contexts) * kv_heads)


def flops(contexts: list[int], heads: int, head_dim: int) -> int:
    return 4 * heads * head_dim * sum(contexts)
