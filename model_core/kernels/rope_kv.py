"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) fused with the write of K and V to the paged cache.

NeoX convention, as Hugging Face Llama: component i pairs with i + D/2. Cache layout: logical [pages, page_size,
kv_heads, D], any strides with D contiguous; slot = page * page_size + offset. The rotation is computed in float32 and
rounded once.
"""

import torch

from model_core.kernels.runtime import cdiv, jit, next_power_of_2, tl

_HEADS, _WARPS = 32, 4  # query heads of a program, about: Llama-2-7B's 1920 tokens take 37.7 us, with one 38 to 116 (H100)


@jit
def _rotate(x_ptr, to_ptr, cos, sin, column, mask, HALF: tl.constexpr):
    """Read the pair (column, column + HALF) at x_ptr, turn it, write it at to_ptr."""
    first = tl.load(x_ptr + column, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + HALF + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(to_ptr + column, (first * cos - second * sin).to(to_ptr.dtype.element_ty), mask=mask)
    tl.store(to_ptr + HALF + column, (second * cos + first * sin).to(to_ptr.dtype.element_ty), mask=mask)


@jit(do_not_specialize_on_alignment=["q_ptr", "k_ptr", "v_ptr", "position_ptr", "slot_ptr"])
def _rope_kv_kernel(
    q_ptr, k_ptr, v_ptr, position_ptr, cos_sin_ptr, k_cache_ptr, v_cache_ptr, slot_ptr,
    q_token, q_head, k_token, k_head, v_token, v_head, cos_sin_row,
    k_page, k_slot, k_cache_head, v_page, v_slot, v_cache_head,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # One program: one token, BLOCK_KV KV heads with the query heads that share them.
    token, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_KV
    HALF: tl.constexpr = D // 2
    half = tl.arange(0, BLOCK_HALF)
    in_half = half < HALF
    row = cos_sin_ptr + tl.load(position_ptr + token).to(tl.int64) * cos_sin_row
    cos = tl.load(row + half, mask=in_half, other=0.0)[None, :]
    sin = tl.load(row + HALF + half, mask=in_half, other=0.0)[None, :]

    head = first * GROUP + tl.arange(0, BLOCK_Q)[:, None]
    ours = head < tl.minimum(first + BLOCK_KV, KV_HEADS) * GROUP
    q = q_ptr + token * q_token + head * q_head
    _rotate(q, q, cos, sin, half[None, :], ours & in_half[None, :], HALF)

    head = first + tl.arange(0, BLOCK_KV)[:, None]
    slot = tl.load(slot_ptr + token).to(tl.int64)
    page, offset = slot // PAGE, slot % PAGE
    k_to = k_cache_ptr + page * k_page + offset * k_slot + head * k_cache_head
    _rotate(k_ptr + token * k_token + head * k_head, k_to, cos, sin, half[None, :], (head < KV_HEADS) & in_half[None, :], HALF)
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = (head < KV_HEADS) & (d < D)
    v = tl.load(v_ptr + token * v_token + head * v_head + d, mask=mask, other=0.0)
    v_to = v_cache_ptr + page * v_page + offset * v_slot + head * v_cache_head
    tl.store(v_to + d, v.to(v_cache_ptr.dtype.element_ty), mask=mask)


def rope_kv_write(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor,
    k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor,
) -> None:
    """Triton. Rotate q [T, Hq, D] in place; write rotated k and v [T, Hkv, D] to their slots; k and v stay as they are.

    positions and slot_mapping int [T], slots distinct and >= 0 (padding rows point to a dump page); cos_sin float32
    [context, D], cos then sin of D/2 angles; caches [pages, page_size, Hkv, D].
    """
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    assert k.shape == v.shape == (tokens, kv_heads, dim) and heads % kv_heads == 0 and dim % 2 == 0
    assert k_cache.shape == v_cache.shape and k_cache.shape[2:] == (kv_heads, dim) and cos_sin.shape[1] == dim
    assert all(x.stride(-1) == 1 for x in (q, k, v, k_cache, v_cache, cos_sin))
    if tokens == 0:
        return
    group = heads // kv_heads
    each = max(1, min(next_power_of_2(kv_heads), _HEADS // next_power_of_2(group)))
    _rope_kv_kernel[(tokens, cdiv(kv_heads, each))](
        q, k, v, positions, cos_sin, k_cache, v_cache, slot_mapping,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], cos_sin.stride(0), *k_cache.stride()[:3], *v_cache.stride()[:3],
        GROUP=group, KV_HEADS=kv_heads, PAGE=k_cache.shape[1], D=dim, BLOCK_Q=next_power_of_2(each * group), BLOCK_KV=each,
        BLOCK_HALF=next_power_of_2(dim // 2), BLOCK_D=next_power_of_2(dim), num_warps=_WARPS,
    )


def rope_kv_write_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor,
    k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor,
) -> None:
    """Reference of `rope_kv_write`."""
    cos, sin = cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    rotated = _rotated(k, cos, sin).to(k_cache.dtype)
    if k_cache.is_contiguous():
        k_cache.flatten(0, 1).index_copy_(0, slot_mapping, rotated)
        v_cache.flatten(0, 1).index_copy_(0, slot_mapping, v.to(v_cache.dtype))
    else:
        places = slot_mapping // k_cache.shape[1], slot_mapping % k_cache.shape[1]
        k_cache.index_put_(places, rotated)
        v_cache.index_put_(places, v.to(v_cache.dtype))
    q.copy_(_rotated(q, cos, sin))


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """cos and sin [T, 1, D], sin of the first half negative: each half is turned by what lies in the other."""
    wide = x.float()
    return (wide * cos).addcmul_(wide.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


def bytes_moved(tokens: int, heads: int, kv_heads: int, head_dim: int, element_size: int) -> int:
    """q read and written, k and v read and written, one float32 row of cos_sin per token."""
    return tokens * (2 * (heads + 2 * kv_heads) * head_dim * element_size + 4 * head_dim)


def flops(tokens: int, heads: int, kv_heads: int, head_dim: int) -> int:
    """Three operations per rotated component (two products, one sum)."""
    return 3 * tokens * (heads + kv_heads) * head_dim
