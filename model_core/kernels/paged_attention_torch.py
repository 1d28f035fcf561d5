"""Reference of kernels/paged_attention.py, and what CPU serving runs."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from model_core.kernels.runtime import cdiv
from model_core.model.batch import Batch

# Not cuDNN's, which plans anew for every length that a thread has not seen.
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def paged_attention_torch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: Batch,
    *,
    scale: float,
    sliding_window: int | None = None,
    by_token: bool = False,
) -> torch.Tensor:
    """One scaled_dot_product_attention per sequence; shapes as in `paged_attention`.

    by_token: one per query token, so that its bits do not depend on the chunk that it is part of.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    page_size, window = k_cache.shape[1], sliding_window or 0
    on_cpu = q.device.type == "cpu"
    columns = cdiv(batch.max_context_len, page_size)
    tables = batch.block_tables[:, :columns].tolist() if on_cpu else batch.block_tables  # a GPU is not waited for
    start = 0
    with nullcontext() if on_cpu else sdpa_kernel(_BACKENDS):
        for s, (query_len, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
            first = max(0, context - query_len - window + 1) if window else 0  # the oldest key any of these queries sees
            low, high = first // page_size, cdiv(context, page_size)
            pages = tables[s][low:high]
            k = _gather(k_cache, pages)[first - low * page_size : context - low * page_size].transpose(0, 1).unsqueeze(0)
            v = _gather(v_cache, pages)[first - low * page_size : context - low * page_size].transpose(0, 1).unsqueeze(0)
            rows = q[start : start + query_len]
            attend = _each_alone if by_token else _together
            attend(rows, k, v, out[start : start + query_len], window, scale)
            start += query_len
    return out


def _together(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, window: int, scale: float) -> None:
    """out [T, Hq, D] of the last T positions' queries; k and v [1, Hkv, n, D] of all n keys that any of them sees."""
    query_len, seen = q.shape[0], k.shape[2]
    mask = None
    if query_len > 1 and (window or query_len < seen):
        position = torch.arange(seen - query_len, seen, device=q.device)[:, None]
        key = torch.arange(seen, device=q.device)[None, :]
        mask = key <= position
        if window:
            mask &= key > position - window
    attended = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0), k, v, attn_mask=mask, scale=scale, is_causal=query_len > 1 and mask is None,
        enable_gqa=q.shape[1] != k.shape[1])  # fmt: skip
    out.copy_(attended[0].transpose(0, 1))


def _each_alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, window: int, scale: float) -> None:
    """The same, every call with exactly the keys that its token sees. The heads that share a KV head are its query rows:
    nothing is masked, and no key is copied once per head."""
    (query_len, _, dim), (kv_heads, seen) = q.shape, k.shape[1:3]
    for token in range(query_len):
        end = seen - query_len + token + 1
        begin = max(0, end - window) if window else 0
        rows = q[token].reshape(1, kv_heads, -1, dim).clone()  # at an address aligned alike for every token
        attended = F.scaled_dot_product_attention(rows, k[:, :, begin:end], v[:, :, begin:end], scale=scale)
        out[token] = attended[0].flatten(0, 1)


def _gather(cache: torch.Tensor, pages: list[int] | torch.Tensor) -> torch.Tensor:
    """The pages' slots end to end, [n, Hkv, D]: a view where the pages are neighbours, else a copy."""
    if isinstance(pages, list):
        low, count = pages[0], len(pages)
        if pages[-1] - low == count - 1 and pages == list(range(low, low + count)):
            return cache[low : low + count].flatten(0, 1)
        pages = torch.tensor(pages)
    return cache.index_select(0, pages).flatten(0, 1)
