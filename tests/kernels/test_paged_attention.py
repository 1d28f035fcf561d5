"""Both kernels and the reference against float64, with every slot that must not be read full of NaN."""

import pytest
import torch

from model_core.kernels.paged_attention import bytes_moved, flops, paged_attention
from model_core.kernels.paged_attention_torch import paged_attention_torch
from model_core.kernels.prompt_attention import streams
from model_core.model.batch import Batch

GPU = torch.cuda.is_available()
HOPPER = GPU and torch.cuda.get_device_capability()[0] == 9

# (query length, context length) per sequence, decodes first
DECODES = [(1, 1), (1, 16), (1, 17), (1, 129), (1, 300)]
PREFILLS = [(5, 5), (33, 33), (7, 40), (16, 144)]  # whole prompts, a chunk after a prefix, a chunk at a page's border
SHAPES = [(3, 1, 64), (8, 2, 32), (4, 4, 80)] + [(32, 4, 64), (32, 32, 128), (9, 3, 96)] * GPU


def build(lengths, heads, kv_heads, dim, dtype, device, page_size=16, head_major=False, poison=float("nan")):
    """A batch over scattered pages, its caches, and keys and values [context, kv_heads, dim] of each sequence."""
    counts = [-(-context // page_size) for _, context in lengths]
    pages = sum(counts) + 3
    inner = (kv_heads, page_size) if head_major else (page_size, kv_heads)
    storage = [torch.full((pages, *inner, dim), poison, dtype=dtype, device=device) for _ in range(2)]
    k_cache, v_cache = (cache.transpose(1, 2) if head_major else cache for cache in storage)
    free = (torch.randperm(pages - 1) + 1).tolist()
    tables = torch.zeros((len(lengths), max(counts)), dtype=torch.int32)
    truth = []
    for s, (_, context) in enumerate(lengths):
        own = [free.pop() for _ in range(counts[s])]
        tables[s, : counts[s]] = torch.tensor(own, dtype=torch.int32)
        k, v = (torch.randn(context, kv_heads, dim, device=device).to(dtype) for _ in range(2))
        for position in range(context):
            k_cache[own[position // page_size], position % page_size] = k[position]
            v_cache[own[position // page_size], position % page_size] = v[position]
        truth.append((k, v))
    queries, contexts = [q for q, _ in lengths], [c for _, c in lengths]
    starts = torch.tensor([0, *queries]).cumsum(0)
    positions = torch.cat([torch.arange(c - q, c) for q, c in lengths])
    batch = Batch(
        token_ids=torch.zeros(sum(queries), dtype=torch.int64, device=device), positions=positions.to(device),
        slot_mapping=torch.zeros(sum(queries), dtype=torch.int64, device=device),
        query_start=starts.int().to(device), context_len=torch.tensor(contexts, dtype=torch.int32, device=device),
        block_tables=tables.to(device), logit_rows=(starts[1:] - 1).to(device), query_lens=queries, context_lens=contexts,
        num_decodes=sum(q == 1 for q in queries),
    )  # fmt: skip
    q = torch.randn(sum(queries), heads, dim, device=device).to(dtype)
    return batch, q, k_cache, v_cache, truth


def chunk_of(batch, start, stop):
    """Tokens [start, stop) of a batch of one prompt, as a batch."""
    count, device = stop - start, batch.token_ids.device
    return Batch(
        token_ids=batch.token_ids[:count], positions=batch.positions[start:stop], slot_mapping=batch.slot_mapping[:count],
        query_start=torch.tensor([0, count], dtype=torch.int32, device=device),
        context_len=torch.tensor([stop], dtype=torch.int32, device=device), block_tables=batch.block_tables,
        logit_rows=batch.logit_rows, query_lens=[count], context_lens=[stop], num_decodes=0)  # fmt: skip


def exact(q, truth, lengths, scale, window):
    rows, out = 0, []
    for (queries, context), (k, v) in zip(lengths, truth, strict=True):
        group = q.shape[1] // k.shape[1]
        k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("qhd,nhd->hqn", q[rows : rows + queries].double(), k) * scale
        position = torch.arange(context - queries, context, device=q.device)[:, None]
        n = torch.arange(context, device=q.device)[None, :]
        seen = (n <= position) & ((n > position - window) if window else True)
        out.append(torch.einsum("hqn,nhd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
        rows += queries
    return torch.cat(out)


@pytest.mark.parametrize("heads,kv_heads,dim", SHAPES)
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("op", [paged_attention, paged_attention_torch])
def test_decodes_and_prefills_in_one_batch(device, dtype, close, op, heads, kv_heads, dim, window):
    lengths = DECODES + PREFILLS
    poison = float("nan") if op is paged_attention else 1e4  # the reference may multiply what it masks by zero
    batch, q, k_cache, v_cache, truth = build(lengths, heads, kv_heads, dim, dtype, device, poison=poison)
    out = op(q, k_cache, v_cache, batch, scale=dim**-0.5, sliding_window=window)
    # weights are rounded to the values' dtype before the second product, the result once more; values are about 1
    close(out, exact(q, truth, lengths, dim**-0.5, window), 4 if dtype != torch.float32 else 40, 1.0)


@pytest.mark.parametrize("page_size", [8, 32] + [256] * GPU)
@pytest.mark.parametrize("head_major", [False, True])
def test_page_sizes_and_layouts(device, close, page_size, head_major):
    lengths = [(1, 100), (1, 33), (20, 70)]
    batch, q, k_cache, v_cache, truth = build(lengths, 4, 2, 64, torch.float32, device, page_size, head_major)
    out = paged_attention(q, k_cache, v_cache, batch, scale=0.1)
    close(out, exact(q, truth, lengths, 0.1, None), 40, 1.0)


PROMPTS = [(5, 5), (33, 33), (7, 40), (16, 144), (257, 600), (128, 128), (127, 255), (300, 300), (2, 129)]


@pytest.mark.skipif(not HOPPER, reason="needs Hopper's TMA and wgmma")
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "page_size"),
                         [(32, 4, 64, 16), (8, 8, 128, 16), (9, 3, 64, 256), (8, 2, 128, 8)])  # fmt: skip
@pytest.mark.parametrize("window", [None, 50, 300])
def test_streamed_prompts(close, heads, kv_heads, dim, page_size, window):
    """What lies behind a sequence's end, in its last page and in others', is NaN."""
    batch, q, k_cache, v_cache, truth = build(PROMPTS, heads, kv_heads, dim, torch.bfloat16, "cuda", page_size, head_major=True)
    assert streams(q, k_cache, v_cache, 128)
    found = [paged_attention(q, k_cache, v_cache, batch, scale=dim**-0.5, sliding_window=window, streamed=streamed)
             for streamed in (True, False)]  # fmt: skip
    for out in found:
        close(out, exact(q, truth, PROMPTS, dim**-0.5, window), 4, 1.0)
    assert not torch.equal(*found), "the same kernel twice"


@pytest.mark.skipif(not HOPPER, reason="needs Hopper's TMA and wgmma")
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 4, 64), (4, 4, 128)])
def test_streamed_chunks_give_the_bits_of_the_whole(heads, kv_heads, dim):
    batch, q, k_cache, v_cache, _ = build([(400, 400)], heads, kv_heads, dim, torch.bfloat16, "cuda", head_major=True)
    whole = paged_attention(q, k_cache, v_cache, batch, scale=0.2)
    for start, stop in ((0, 50), (50, 177), (177, 178), (178, 400)):
        out = paged_attention(q[start:stop], k_cache, v_cache, chunk_of(batch, start, stop), scale=0.2)
        assert torch.equal(out, whole[start:stop]), (start, stop)


def test_a_row_does_not_depend_on_its_batch(device, dtype):
    """Bitwise: the split of a context depends on its own length alone."""
    lengths = [(1, 300), (1, 40), (1, 129)]
    batch, q, k_cache, v_cache, _ = build(lengths, 4, 2, 32, dtype, device)
    whole = paged_attention(q, k_cache, v_cache, batch, scale=0.2)
    for s, (_, context) in enumerate(lengths):
        alone = Batch(
            token_ids=batch.token_ids[:1], positions=batch.positions[s : s + 1], slot_mapping=batch.slot_mapping[:1],
            query_start=batch.query_start[:2], context_len=batch.context_len[s : s + 1],
            block_tables=batch.block_tables[s : s + 1], logit_rows=batch.logit_rows[:1], query_lens=[1],
            context_lens=[context], num_decodes=1)  # fmt: skip
        assert torch.equal(paged_attention(q[s : s + 1], k_cache, v_cache, alone, scale=0.2)[0], whole[s])


def test_chunks_give_the_bits_of_the_whole(device, dtype):
    """On a GPU; in the interpreter numpy's products depend on a row's place in its tile."""
    batch, q, k_cache, v_cache, _ = build([(96, 96)], 4, 2, 32, dtype, device)
    whole = paged_attention(q, k_cache, v_cache, batch, scale=0.2)
    for start, stop in ((0, 50), (50, 96)):
        out = paged_attention(q[start:stop], k_cache, v_cache, chunk_of(batch, start, stop), scale=0.2)
        if GPU:
            assert torch.equal(out, whole[start:stop])
        else:
            assert torch.allclose(out, whole[start:stop], atol=4 * torch.finfo(dtype).eps)


@pytest.mark.skipif(not GPU, reason="slow in the interpreter")
def test_a_long_context(device, dtype, close):
    lengths = [(1, 9000), (64, 5000)]
    batch, q, k_cache, v_cache, truth = build(lengths, 8, 2, 64, dtype, device)
    out = paged_attention(q, k_cache, v_cache, batch, scale=0.125)
    close(out, exact(q, truth, lengths, 0.125, None), 4 if dtype != torch.float32 else 40, 1.0)


def test_formulas():
    batch, *_ = build([(1, 10), (4, 6)], 4, 2, 8, torch.float32, "cpu")
    assert bytes_moved(batch, 4, 2, 8, 4) == 4 * 8 * (2 * 5 * 4 + 2 * 16 * 2)
    assert flops(batch, 4, 8) == 4 * 8 * 4 * (10 + 3 + 4 + 5 + 6)
