"""Causal attention over the paged KV cache: one kernel for chunks of prompts, a split-KV pair for single tokens. On Hopper
prompts are prompt_attention.py's, and the first kernel is its twin for all other shapes.

Both stream tiles of keys through an online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867; tiled as in
FlashAttention-2, Dao 2023, arXiv 2307.08691), accumulate in float32 and pack the query heads that share a KV head into the
rows of one tile. Decode splits a long context over programs (Flash-Decoding, Dao et al. 2023) by a rule that looks
at that sequence's own length only, and adds the parts in split order: a row's result does not depend on its batch.
"""

import functools
from dataclasses import dataclass

import torch

from model_core.kernels.prompt_attention import prompt_attention, streams
from model_core.kernels.runtime import cdiv, jit, next_power_of_2, tl
from model_core.model.batch import Batch

SPLIT = 128  # keys of one decode split, doubled and more where a context would need over MAX_SPLITS of them
MAX_SPLITS = 64
_LOG2_E = 1.4426950408889634
_POINTERS = ["q_ptr", "out_ptr", "query_start_ptr", "context_ptr", "table_ptr", "block_ptr"]  # views into larger buffers


@dataclass(frozen=True)
class Tiles:
    """Tile sides and launch shape of one kernel. A pure function of the model's shapes, never of a batch's."""

    rows: int  # (token, head) pairs per program
    keys: int  # keys per loop turn
    warps: int
    stages: int


def prefill_tiles(group: int, head_dim: int, dtype: torch.dtype) -> Tiles:
    """float32 multiplies on the plain cores (no tf32), so its tiles must live in few registers."""
    least = next_power_of_2(group)
    if dtype == torch.float32:
        return Tiles(max(32, least), 32, 4, 1)
    if head_dim > 128:
        return Tiles(max(64, least), 32, 4, 2)
    # 128 keys a turn: 1900 tokens of TinyLlama take 72 us instead of 78, of Llama-2-7B 145 instead of 189 (H100)
    keys = 128 if _much_shared_memory() else 64
    return Tiles(max(128, least), keys, 4 if head_dim <= 64 else 8, 3 if head_dim <= 64 or keys == 128 else 2)


@functools.cache
def _much_shared_memory() -> bool:
    """Whether a program may have the 128 KiB that the larger tiles take (Ampere's and Hopper's data-center GPUs)."""
    if not torch.cuda.is_available():
        return False
    most: int = getattr(torch.cuda.get_device_properties(0), "shared_memory_per_block_optin", 0)  # not in torch's stubs
    return most >= 160 << 10


def block_tokens(group: int, head_dim: int, dtype: torch.dtype) -> int:
    """Query tokens that one program of the prefill kernel takes."""
    return prefill_tiles(group, head_dim, dtype).rows // group


def decode_tiles(group: int, head_dim: int, dtype: torch.dtype) -> Tiles:
    """tl.dot wants 16 rows at least; a group of fewer heads is padded (costs arithmetic, not bytes)."""
    rows = max(16, next_power_of_2(group))
    if dtype == torch.float32:
        return Tiles(rows, 32, 4, 1)
    return Tiles(rows, 64 if head_dim <= 128 else 32, 4, 3)


@jit
def _visit(
    q, acc, top, norm, last, k_ptr, v_ptr, table_ptr, begin, end, lowest, qk_scale, k_page, k_slot, v_page, v_slot,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    MASKED: tl.constexpr, STAGES: tl.constexpr,
):
    """Fold keys [begin, end) of one sequence and KV head into (acc [M, BLOCK_D], top [M], norm [M]); top is not scaled.

    last [M]: the last position each row sees; lowest: the first one that any row sees. MASKED False promises that every
    row sees every key.
    """
    d = tl.arange(0, BLOCK_D)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)
        present = (n >= lowest) & (n < end) if MASKED else n >= 0
        page = tl.load(table_ptr + n // PAGE, mask=present, other=0).to(tl.int64)
        # Keys outside are never read: whatever lies in free or foreign slots (NaN too) cannot reach a product.
        k_at = k_ptr + (page * k_page + (n % PAGE) * k_slot)[None, :] + d[:, None]
        v_at = v_ptr + (page * v_page + (n % PAGE) * v_slot)[:, None] + d[None, :]
        if MASKED or D != BLOCK_D:
            k = tl.load(k_at, mask=present[None, :] & (d < D)[:, None], other=0.0)
            v = tl.load(v_at, mask=present[:, None] & (d < D)[None, :], other=0.0)
        else:
            k = tl.load(k_at)
            v = tl.load(v_at)
        scores = tl.dot(q, k, input_precision="ieee")
        if MASKED:
            seen = present[None, :] & (n[None, :] <= last[:, None])
            if WINDOW > 0:
                seen = seen & (n[None, :] > last[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
        # qk_scale holds log2(e): exp2 is one instruction. Fused products are spelled out, for the compiler may fuse in one of
        # the two variants only, and a key must weigh the same bits in both.
        weights = tl.exp2(tl.fma(scores, qk_scale, -(finite_top * qk_scale)[:, None]))
        shrink = tl.exp2((top - finite_top) * qk_scale)
        norm = tl.fma(norm, shrink, tl.sum(weights, axis=1))
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return acc, top, norm


@jit(do_not_specialize=["table_row"], do_not_specialize_on_alignment=_POINTERS)
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, query_start_ptr, context_ptr, table_ptr, block_ptr, qk_scale,
    q_token, q_head, k_page, k_slot, k_head, v_page, v_slot, v_head, out_token, out_head, table_row,
    GROUP: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr,
):
    # Row r of a block and KV head is query token r // GROUP, head r % GROUP; rows past GROUP * TOKENS are padding.
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    seq = tl.load(block_ptr + 2 * tl.program_id(0))
    kv_head = tl.program_id(1)
    if seq >= 0:
        first_token = tl.load(block_ptr + 2 * tl.program_id(0) + 1) * TOKENS
        query_start = tl.load(query_start_ptr + seq)
        query_len = tl.load(query_start_ptr + seq + 1) - query_start
        past = tl.load(context_ptr + seq) - query_len
        row = tl.arange(0, BLOCK_M)
        token = tl.where(row < GROUP * TOKENS, first_token + row // GROUP, query_len)
        head = kv_head * GROUP + row % GROUP
        d = tl.arange(0, BLOCK_D)
        mask = (token < query_len)[:, None] & (d < D)[None, :]
        at = (query_start + token).to(tl.int64)
        q = tl.load(q_ptr + (at * q_token + head * q_head)[:, None] + d[None, :], mask=mask, other=0.0)

        last_token = tl.minimum(first_token + TOKENS, query_len) - 1
        last = past + tl.minimum(token, query_len - 1)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        norm = tl.zeros([BLOCK_M], tl.float32)
        k_ptr += kv_head * k_head
        v_ptr += kv_head * v_head
        table_ptr += seq.to(tl.int64) * table_row
        # Tiles start at multiples of BLOCK_N whatever the chunk, so chunking does not change a row's sums.
        lowest = past * 0
        if WINDOW > 0:
            lowest = tl.maximum(past + first_token - WINDOW + 1, 0)
            begin = lowest // BLOCK_N * BLOCK_N
        else:
            begin = (past + first_token + 1) // BLOCK_N * BLOCK_N
            acc, top, norm = _visit(
                q, acc, top, norm, last, k_ptr, v_ptr, table_ptr, 0, begin, 0, qk_scale, k_page, k_slot, v_page, v_slot,
                D, BLOCK_D, BLOCK_N, PAGE, WINDOW, False, STAGES)  # fmt: skip
        acc, top, norm = _visit(
            q, acc, top, norm, last, k_ptr, v_ptr, table_ptr, begin, past + last_token + 1, lowest, qk_scale,
            k_page, k_slot, v_page, v_slot, D, BLOCK_D, BLOCK_N, PAGE, WINDOW, True, STAGES)  # fmt: skip
        out = (acc / norm[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (at * out_token + head * out_head)[:, None] + d[None, :], out, mask=mask)


@jit
def _visible(context_ptr, seq, WINDOW: tl.constexpr, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """(first visible key, context length, keys of one split) of a sequence's newest token."""
    context = tl.load(context_ptr + seq)
    first = tl.maximum(context - WINDOW, 0) if WINDOW > 0 else context * 0
    return first, context, SPLIT * tl.maximum(tl.cdiv(context - first, SPLIT * MAX_SPLITS), 1)


@jit(do_not_specialize=["table_row"], do_not_specialize_on_alignment=_POINTERS[:-1])
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, part_ptr, stat_ptr, context_ptr, table_ptr, qk_scale,
    q_token, q_head, k_page, k_slot, k_head, v_page, v_slot, v_head, out_token, out_head, table_row,
    GROUP: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr,
    SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr, DIRECT: tl.constexpr,
):
    kv_head, split, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, context, size = _visible(context_ptr, seq, WINDOW, SPLIT, MAX_SPLITS)
    begin = first + split * size
    if DIRECT or begin < context:
        end = tl.minimum(begin + size, context)
        member = tl.arange(0, BLOCK_M)
        head = kv_head * GROUP + member
        d = tl.arange(0, BLOCK_D)
        mask = (member < GROUP)[:, None] & (d < D)[None, :]
        at = seq.to(tl.int64)
        q = tl.load(q_ptr + at * q_token + head[:, None] * q_head + d[None, :], mask=mask, other=0.0)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        norm = tl.zeros([BLOCK_M], tl.float32)
        last = tl.zeros([BLOCK_M], tl.int32) + (context - 1)
        # The range itself is the window, so _visit need not know of one.
        full = begin + (end - begin) // BLOCK_N * BLOCK_N
        k_ptr += kv_head * k_head
        v_ptr += kv_head * v_head
        table_ptr += at * table_row
        acc, top, norm = _visit(
            q, acc, top, norm, last, k_ptr, v_ptr, table_ptr, begin, full, begin, qk_scale, k_page, k_slot, v_page, v_slot,
            D, BLOCK_D, BLOCK_N, PAGE, 0, False, STAGES)  # fmt: skip
        acc, top, norm = _visit(
            q, acc, top, norm, last, k_ptr, v_ptr, table_ptr, full, end, begin, qk_scale, k_page, k_slot, v_page, v_slot,
            D, BLOCK_D, BLOCK_N, PAGE, 0, True, STAGES)  # fmt: skip
        if DIRECT:
            out = acc / tl.where(norm == 0.0, 1.0, norm)[:, None]
            to = out_ptr + at * out_token + head[:, None] * out_head + d[None, :]
            tl.store(to, out.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            part = (at * tl.num_programs(0) * GROUP + head) * tl.num_programs(1) + split
            tl.store(part_ptr + part[:, None] * D + d[None, :], acc, mask=mask)
            tl.store(stat_ptr + part * 2, top, mask=member < GROUP)
            tl.store(stat_ptr + part * 2 + 1, norm, mask=member < GROUP)


@jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["out_ptr", "context_ptr"])
def _combine_kernel(
    out_ptr, part_ptr, stat_ptr, context_ptr, qk_scale, out_token, out_head, splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW: tl.constexpr, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr,
):
    # Every split in one tile of fixed height: the tree of additions is the same for every grid.
    head, seq = tl.program_id(0), tl.program_id(1)
    first, context, size = _visible(context_ptr, seq, WINDOW, SPLIT, MAX_SPLITS)
    split = tl.arange(0, MAX_SPLITS)
    used = split < tl.cdiv(context - first, size)
    d = tl.arange(0, BLOCK_D)
    part = (seq.to(tl.int64) * tl.num_programs(0) + head) * splits + split
    top = tl.load(stat_ptr + part * 2, mask=used, other=float("-inf"))
    norm = tl.load(stat_ptr + part * 2 + 1, mask=used, other=0.0)
    acc = tl.load(part_ptr + part[:, None] * D + d[None, :], mask=used[:, None] & (d < D)[None, :], other=0.0)
    best = tl.max(top, axis=0)
    weight = tl.exp2((top - tl.where(best == float("-inf"), 0.0, best)) * qk_scale)
    total = tl.sum(norm * weight, axis=0)
    out = tl.sum(acc * weight[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    to = out_ptr + seq.to(tl.int64) * out_token + head * out_head + d
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=d < D)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: Batch,
    *,
    scale: float,
    sliding_window: int | None = None,
    out: torch.Tensor | None = None,
    streamed: bool = True,
) -> torch.Tensor:
    """Triton. q [T, Hq, D] (any strides, D contiguous), caches [pages, page_size, Hkv, D] (likewise) -> [T, Hq, D].

    Token t of a sequence sees the sequence's cached positions up to its own, with `sliding_window` W only the last W of
    them. K and V of the batch's own tokens must be in the cache. Grids come from the batch's host-side ints (or, without
    decodes, from `blocks` alone, so that a captured graph can be replayed on another batch); nothing waits for the device.
    streamed: prompts by prompt_attention.py where it can compute them.
    """
    tokens, heads, dim = q.shape
    page_size, kv_heads = k_cache.shape[1:3]
    assert q.dtype == k_cache.dtype == v_cache.dtype and k_cache.shape == v_cache.shape and k_cache.shape[3] == dim
    assert heads % kv_heads == 0 and q.stride(2) == k_cache.stride(3) == v_cache.stride(3) == 1
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device) if out is None else out
    assert out.stride(2) == 1
    group, window, decodes = heads // kv_heads, sliding_window or 0, batch.num_decodes
    strides = (*q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], *out.stride()[:2], batch.block_tables.stride(0))
    shape = {"GROUP": group, "PAGE": page_size, "D": dim, "BLOCK_D": max(16, next_power_of_2(dim)), "WINDOW": window}
    if decodes:
        tiles = decode_tiles(group, dim, q.dtype)
        longest = max(batch.context_lens[:decodes])
        splits = min(MAX_SPLITS, cdiv(min(longest, window or longest), SPLIT))
        direct = splits <= 1
        part, stat = out, out  # never touched when one split writes the result itself
        if not direct:
            part = torch.empty((decodes, heads, splits, dim), dtype=torch.float32, device=q.device)
            stat = torch.empty((decodes, heads, splits, 2), dtype=torch.float32, device=q.device)
        _decode_kernel[(kv_heads, splits, decodes)](
            q, k_cache, v_cache, out, part, stat, batch.context_len, batch.block_tables, scale * _LOG2_E, *strides,
            BLOCK_M=tiles.rows, BLOCK_N=tiles.keys, STAGES=tiles.stages, SPLIT=SPLIT, MAX_SPLITS=MAX_SPLITS,
            DIRECT=direct, num_warps=tiles.warps, **shape)  # fmt: skip
        if not direct:
            _combine_kernel[(heads, decodes)](
                out, part, stat, batch.context_len, scale * _LOG2_E, *out.stride()[:2], splits, D=dim, BLOCK_D=shape["BLOCK_D"],
                WINDOW=window, SPLIT=SPLIT, MAX_SPLITS=MAX_SPLITS, num_warps=4)  # fmt: skip
    if decodes < batch.num_seqs:
        tiles = prefill_tiles(group, dim, q.dtype)
        blocks = batch.prefill_blocks(block_tokens(group, dim, q.dtype))
        if streamed and streams(q, k_cache, v_cache, tiles.rows):
            prompt_attention(q, k_cache, v_cache, out, batch.query_start, batch.context_len, batch.block_tables, blocks,
                             scale=scale, window=window)  # fmt: skip
            return out
        _prefill_kernel[(blocks.shape[0], kv_heads)](
            q, k_cache, v_cache, out, batch.query_start, batch.context_len, batch.block_tables, blocks, scale * _LOG2_E,
            *strides, BLOCK_M=tiles.rows, BLOCK_N=tiles.keys, STAGES=tiles.stages, num_warps=tiles.warps,
            **shape)  # fmt: skip
    return out


def bytes_moved(batch: Batch, heads: int, kv_heads: int, head_dim: int, element_size: int, window: int = 0) -> int:
    """q read and out written, and every visible K and V once per sequence (the least any kernel can do)."""
    keys = sum(
        min(context, query_len + window - 1) if window else context
        for query_len, context in zip(batch.query_lens, batch.context_lens, strict=True)
    )
    return 2 * head_dim * element_size * (sum(batch.query_lens) * heads + keys * kv_heads)


def flops(batch: Batch, heads: int, head_dim: int, window: int = 0) -> int:
    """Two products of 2 * head_dim operations per visible (query, key) pair and head; the softmax is not counted."""
    pairs = 0
    for query_len, context in zip(batch.query_lens, batch.context_lens, strict=True):
        for seen in (range(context - query_len + 1, context + 1)):
            pairs += min(seen, window) if window else seen
    return 4 * head_dim * heads * pairs
