"""Causal attention of prompts over the paged KV cache on Hopper: pages come by TMA, products by wgmma, roles by warps.

One warp asks for pages (TMA); each of two warp groups holds 64 rows of queries and folds the same keys into them by an online
softmax. A group multiplies the next keys while it multiplies the values of the last ones, and the groups run against each
other (the schedule of FlashAttention-3, Shah et al. 2024, arXiv 2407.08608). Rows pack the query heads of a KV head as in
paged_attention.py, whose kernel of prompts is this one's twin: it computes the same where this one cannot, and has the
reference and the formulas of bytes and FLOPs. One prompt, microseconds (H100, 2026-11-25; cuDNN reads contiguous keys):

                    TinyLlama-1.1B          Llama-2-7B              Llama-3-8B
    tokens          512  1024  1900  4096   512  1024  1900  4096   512  1024  1900  4096
    twin             17    31    73   208    22    61   147   473    21    56   134   413
    this             12    21    52   187    15    28    74   257    15    28    71   244
    cuDNN            11    24    55   178    14    33    76   262    14    32    75   262

64 keys a turn gain a microsecond up to 1024 tokens and lose a tenth at 4096; a third group gains at 4096 tokens of TinyLlama
only (175 us), for it leaves 128 registers a thread.
"""

from __future__ import annotations

from typing import Any

import torch

from model_core.kernels.runtime import gl, gluon_jit, triton

if triton is not None and gl.constexpr is not int:
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

ROWS = 128  # (token, head) pairs of a program: 64 for each of its two groups
_KEYS = 128  # of one turn
_STAGES = 2  # turns whose keys and values are on their way
_REGISTERS, _ASKING = 232, 40  # of a thread that multiplies, of one that asks: together the 65,536 of a multiprocessor
_LOG2_E = 1.4426950408889634


@gluon_jit
def _ask(
    desc, pages, full, stage, tile, table_ptr, kv_head, context,
    KV_HEADS: gl.constexpr, PAGE: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr, BOX: gl.constexpr,
):  # fmt: skip
    """Keys (or values) of one tile on their way, in boxes of BOX tokens and 64 columns; past the end the last box again."""
    BOXES: gl.constexpr = KEYS // BOX
    mbarrier.expect(full.index(stage), KEYS * D * 2)
    for box in gl.static_range(BOXES):
        n = gl.minimum(tile * KEYS + box * BOX, (context - 1) // BOX * BOX)
        row = (gl.load(table_ptr + n // PAGE) * KV_HEADS + kv_head) * PAGE + n % PAGE
        for half in gl.static_range(D // 64):
            to = pages.index((stage * (D // 64) + half) * BOXES + box)
            tma.async_copy_global_to_shared(desc, [row, half * 64], full.index(stage), to)


@gluon_jit
def _load(
    k_desc, v_desc, ks, vs, k_full, k_empty, v_full, v_empty, table_ptr, kv_head, context, begin, end,
    KV_HEADS: gl.constexpr, PAGE: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that asks: tiles [begin, end), the last first, as soon as a stage is free."""
    BOX: gl.constexpr = k_desc.block_type.shape[0]
    BOXES: gl.constexpr = STAGES * (D // 64) * (KEYS // BOX)
    k_pages = ks._reinterpret(k_desc.dtype, [BOXES, BOX, 64], k_desc.layout)
    v_pages = vs._reinterpret(k_desc.dtype, [BOXES, BOX, 64], k_desc.layout)
    for turn in range(end - begin):
        stage, lap = turn % STAGES, (turn // STAGES) & 1
        mbarrier.wait(k_empty.index(stage), lap ^ 1)
        _ask(k_desc, k_pages, k_full, stage, end - 1 - turn, table_ptr, kv_head, context, KV_HEADS, PAGE, D, KEYS, BOX)
        mbarrier.wait(v_empty.index(stage), lap ^ 1)
        _ask(v_desc, v_pages, v_full, stage, end - 1 - turn, table_ptr, kv_head, context, KV_HEADS, PAGE, D, KEYS, BOX)


@gluon_jit
def _soften(scores, top, norm, last, tile, qk_scale, KEYS: gl.constexpr, WINDOW: gl.constexpr, MASKED: gl.constexpr,
            S: gl.constexpr):  # fmt: skip
    """(weights of these keys, by what earlier sums shrink, new top, new norm); top [M] is not scaled."""
    if MASKED:
        n = tile * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(0, S))
        seen = n[None, :] <= last[:, None]
        if WINDOW > 0:
            seen = seen & (n[None, :] > last[:, None] - WINDOW)
        scores = gl.where(seen, scores, float("-inf"))
    new_top = gl.maximum(top, gl.max(scores, axis=1))
    # a row may see nothing of a whole tile, and that tile may be its first
    finite_top = gl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
    weights = gl.exp2(gl.fma(scores, qk_scale, -(finite_top * qk_scale)[:, None]))
    shrink = gl.exp2((top - finite_top) * qk_scale)
    return weights, shrink, new_top, gl.fma(norm, shrink, gl.sum(weights, axis=1))


@gluon_jit
def _fold(
    qs, k, v, k_full, k_empty, v_full, v_empty, acc, weights, top, norm, last, turn, until, end, qk_scale,
    KEYS: gl.constexpr, STAGES: gl.constexpr, WINDOW: gl.constexpr, MASKED: gl.constexpr, S: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """Turns [turn, until): each multiplies its own keys, and the values of the turn before by the weights it left."""
    zeros = gl.zeros([64, KEYS], gl.float32, layout=S)
    for now in range(turn, until):
        stage, before = now % STAGES, (now - 1) % STAGES
        mbarrier.wait(k_full.index(stage), (now // STAGES) & 1)
        scores = warpgroup_mma(qs, k.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), ((now - 1) // STAGES) & 1)
        summed = warpgroup_mma(weights, v.index(before), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        gl.thread_barrier()
        mbarrier.arrive(k_empty.index(stage))
        fresh, shrink, top, norm = _soften(scores, top, norm, last, end - 1 - now, qk_scale, KEYS, WINDOW, MASKED, S)
        acc = warpgroup_mma_wait(0, deps=(summed,))
        gl.thread_barrier()
        mbarrier.arrive(v_empty.index(before))
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
        weights = gl.convert_layout(fresh.to(k.dtype), P)
    return acc, weights, top, norm


@gluon_jit
def _attend(
    group, q_ptr, out_ptr, qs, ks, vs, k_full, k_empty, v_full, v_empty, query_start, query_len, past, first_token, kv_head,
    begin, full_end, end, context, qk_scale, q_token, q_head, out_token, out_head,
    GROUP: gl.constexpr, TOKENS: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    WINDOW: gl.constexpr,
):  # fmt: skip
    """One warp group's 64 rows: their queries, all tiles from the last to the first, their result. Tiles [full_end, end) need a
    mask, those before only if there is a window."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, A, 2)
    B: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    k = ks._reinterpret(ks.dtype, [STAGES, KEYS, D], ks.layout)
    v = vs._reinterpret(vs.dtype, [STAGES, KEYS, D], vs.layout)

    row = group * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, B))
    token = gl.where(row < GROUP * TOKENS, first_token + row // GROUP, query_len)
    head = kv_head * GROUP + row % GROUP
    d = gl.arange(0, D, layout=gl.SliceLayout(0, B))
    inside = (token < query_len)[:, None] & (d >= 0)[None, :]
    at = (query_start + token).to(gl.int64)
    mine = qs.index(group)
    mine.store(gl.load(q_ptr + (at * q_token + head * q_head)[:, None] + d[None, :], mask=inside, other=0.0))
    fence_async_shared()

    own = group * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, S))
    last = past + gl.minimum(gl.where(own < GROUP * TOKENS, first_token + own // GROUP, query_len), query_len - 1)
    top = gl.full([64], float("-inf"), gl.float32, layout=gl.SliceLayout(1, S))
    norm = gl.zeros([64], gl.float32, layout=gl.SliceLayout(1, S))
    acc = gl.zeros([64, D], gl.float32, layout=A)

    gl.thread_barrier()
    mbarrier.wait(k_full.index(0), 0)
    scores = warpgroup_mma(mine, k.index(0).permute((1, 0)), gl.zeros([64, KEYS], gl.float32, layout=S), use_acc=False,
                           is_async=True)  # fmt: skip
    scores = warpgroup_mma_wait(0, deps=(scores,))
    gl.thread_barrier()
    mbarrier.arrive(k_empty.index(0))
    fresh, shrink, top, norm = _soften(scores, top, norm, last, end - 1, qk_scale, KEYS, WINDOW, True, S)
    weights = gl.convert_layout(fresh.to(ks.dtype), P)
    if end * KEYS > context:
        # What lies behind the sequence's end may be NaN, which no weight of zero makes harmless. Both groups write the same.
        mbarrier.wait(v_full.index(0), 0)
        values = v.index(0).load(B)
        n = (end - 1) * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, B))
        v.index(0).store(gl.where((n < context)[:, None], values, gl.zeros_like(values)))
        fence_async_shared()
        gl.thread_barrier()
    masked = end - gl.maximum(full_end, begin)
    acc, weights, top, norm = _fold(mine, k, v, k_full, k_empty, v_full, v_empty, acc, weights, top, norm, last, 1, masked, end,
                                    qk_scale, KEYS, STAGES, WINDOW, True, S, P)  # fmt: skip
    acc, weights, top, norm = _fold(mine, k, v, k_full, k_empty, v_full, v_empty, acc, weights, top, norm, last,
                                    gl.maximum(masked, 1), end - begin, end, qk_scale, KEYS, STAGES, WINDOW, WINDOW > 0, S,
                                    P)  # fmt: skip
    before = end - begin - 1
    mbarrier.wait(v_full.index(before % STAGES), (before // STAGES) & 1)
    summed = warpgroup_mma(weights, v.index(before % STAGES), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(summed,))
    out = acc / gl.convert_layout(norm, gl.SliceLayout(1, A))[:, None]
    out = gl.convert_layout(out.to(ks.dtype), B)
    gl.store(out_ptr + (at * out_token + head * out_head)[:, None] + d[None, :], out, mask=inside)


@gluon_jit(do_not_specialize=["table_row"],
           do_not_specialize_on_alignment=["query_start_ptr", "context_ptr", "table_ptr", "block_ptr"])  # fmt: skip
def _prompt_kernel(
    q_ptr, k_desc, v_desc, out_ptr, query_start_ptr, context_ptr, table_ptr, block_ptr, qk_scale,
    q_token, q_head, out_token, out_head, table_row,
    GROUP: gl.constexpr, KV_HEADS: gl.constexpr, PAGE: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr, WINDOW: gl.constexpr, REGISTERS: gl.constexpr, ASKING: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    TOKENS: gl.constexpr = 128 // GROUP
    block = gl.program_id(1)  # those with the longest contexts first, so that the short ones fill the end
    seq = gl.load(block_ptr + 2 * block)
    kv_head = gl.program_id(0)
    if seq >= 0:
        first_token = gl.load(block_ptr + 2 * block + 1) * TOKENS
        query_start = gl.load(query_start_ptr + seq)
        query_len = gl.load(query_start_ptr + seq + 1) - query_start
        context = gl.load(context_ptr + seq)
        past = context - query_len
        table = table_ptr + seq.to(gl.int64) * table_row
        begin = past * 0
        if WINDOW > 0:
            begin = gl.maximum(past + first_token - WINDOW + 1, 0) // KEYS
        full_end = (past + first_token + 1) // KEYS
        end = (past + gl.minimum(first_token + TOKENS, query_len) + KEYS - 1) // KEYS

        HALF: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, 64], k_desc.dtype)
        ks = gl.allocate_shared_memory(k_desc.dtype, [STAGES * (D // 64), KEYS, 64], HALF)
        vs = gl.allocate_shared_memory(k_desc.dtype, [STAGES * (D // 64), KEYS, 64], HALF)
        QS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], k_desc.dtype)
        qs = gl.allocate_shared_memory(k_desc.dtype, [2, 64, D], QS)
        k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for s in gl.static_range(STAGES):
            mbarrier.init(k_full.index(s), count=1)
            mbarrier.init(v_full.index(s), count=1)
            mbarrier.init(k_empty.index(s), count=2)
            mbarrier.init(v_empty.index(s), count=2)
        gl.thread_barrier()
        # Written out twice: constants that pass through a variable are none any more.
        gl.warp_specialize([
            (_attend, (0, q_ptr, out_ptr, qs, ks, vs, k_full, k_empty, v_full, v_empty, query_start, query_len, past,
                       first_token, kv_head, begin, full_end, end, context, qk_scale, q_token, q_head, out_token, out_head,
                       GROUP, TOKENS, D, KEYS, STAGES, WINDOW)),
            (_attend, (1, q_ptr, out_ptr, qs, ks, vs, k_full, k_empty, v_full, v_empty, query_start, query_len, past,
                       first_token, kv_head, begin, full_end, end, context, qk_scale, q_token, q_head, out_token, out_head,
                       GROUP, TOKENS, D, KEYS, STAGES, WINDOW)),
            (_load, (k_desc, v_desc, ks, vs, k_full, k_empty, v_full, v_empty, table, kv_head, context, begin, end,
                     KV_HEADS, PAGE, D, KEYS, STAGES)),
        ], [4, 1], [REGISTERS, ASKING])  # fmt: skip


def prompt_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor, query_start: torch.Tensor,
    context_len: torch.Tensor, block_tables: torch.Tensor, blocks: torch.Tensor, *, scale: float, window: int,
) -> None:  # fmt: skip
    """Gluon. Writes `out` [T, Hq, D] at the rows of `blocks`, int32 [n, 2]: (sequence, its block of ROWS // group tokens),
    sequence -1 is none. q, caches, query_start and context_len int32, block_tables int32 [S, pages]: as `paged_attention`
    has them, window 0 is none. Only where `streams` says yes.
    """
    heads, dim = q.shape[1:]
    page_size, kv_heads = k_cache.shape[1:3]
    box = min(page_size, _KEYS)
    layout = gl.NVMMASharedLayout.get_default_for([box, 64], _element(q.dtype))
    descriptors = [TensorDescriptor.from_tensor(cache.transpose(1, 2).view(-1, dim), [box, 64], layout)
                   for cache in (k_cache, v_cache)]  # fmt: skip
    _prompt_kernel[(kv_heads, blocks.shape[0])](
        q, *descriptors, out, query_start, context_len, block_tables, blocks, scale * _LOG2_E,
        *q.stride()[:2], *out.stride()[:2], block_tables.stride(0), GROUP=heads // kv_heads, KV_HEADS=kv_heads,
        PAGE=page_size, D=dim, KEYS=_KEYS, STAGES=_STAGES, WINDOW=window, REGISTERS=_REGISTERS, ASKING=_ASKING,
        num_warps=4)  # fmt: skip


def streams(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, rows: int) -> bool:
    """Whether this kernel can compute it: Hopper, 16-bit values, head dims of whole 128-byte lines, head-major caches, blocks
    of its own number of rows."""
    heads, dim = q.shape[1:]
    return (
        triton is not None and gl.constexpr is not int and q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9
        and dim in (64, 128) and q.dtype in (torch.bfloat16, torch.float16) and rows == ROWS
        and heads // k_cache.shape[2] <= 64 and q.stride(0) % 8 == q.stride(1) % 8 == 0
        and all(cache.transpose(1, 2).is_contiguous() for cache in (k_cache, v_cache)))  # fmt: skip


def _element(dtype: torch.dtype) -> Any:
    return {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
