"""Decode kernel 1 of a layer: RMSNorm, QKV projection, rotary embedding, write of K and V to their page; one launch.

A program owns PAIRS rotation pairs (rows i and i + D/2 of one head, the half-split convention of Hugging Face's Llama),
so both halves of a rotation are in its registers. In the first layer x is a row of the embedding, read in place.
"""

from __future__ import annotations

from typing import Any

import torch

from model_core.kernels.decode import registers, streaming
from model_core.kernels.decode.products import RowTiles, dot_rows, follow, launch_options, load_rows, load_x
from model_core.kernels.decode.state import DecodeState
from model_core.kernels.decode.tiles import (
    Stream,
    TensorTiles,
    TileSpace,
    add_splits,
    fetch_ahead,
    norm_factor,
    tile_product,
)
from model_core.kernels.runtime import cdiv, jit, next_power_of_2, tl

AnyTiles = TensorTiles | registers.RegisterTiles | streaming.StreamTiles

@jit
def _kernel(
    x_ptr, gain_ptr, w_ptr, bias_ptr, cos_sin_ptr, rows_ptr, token_ptr, position_ptr, table_ptr, q_ptr, k_ptr, v_ptr,
    eps, table_row, k_page, k_slot, k_head, v_page, v_slot, v_head,
    M: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    PAIRS: tl.constexpr, BK: tl.constexpr, CHUNKS: tl.constexpr, PAGE: tl.constexpr, EMBED: tl.constexpr,
    BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = D // 2
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    head = tl.program_id(0) * PAIRS // HALF  # PAIRS divides HALF: a program stays inside one head
    d = pair % HALF
    first = head * D + d
    low = load_rows(w_ptr, first, K, BK, CHUNKS)
    high = load_rows(w_ptr, first + HALF, K, BK, CHUNKS)
    follow(PDL)
    for m in tl.static_range(M):
        slot = tl.load(rows_ptr + m)
        page, offset, cos, sin = _place(slot, d, head, True, d < HALF, cos_sin_ptr, position_ptr, table_ptr, table_row,
                                        D, HEADS, KV_HEADS, PAGE)  # fmt: skip
        x_row = tl.load(token_ptr + slot) if EMBED else m
        x, factor = load_x(x_ptr + x_row * K, gain_ptr, K, BK, CHUNKS, True, eps)
        a = dot_rows(low, x, CHUNKS) * factor
        b = dot_rows(high, x, CHUNKS) * factor
        if BIAS:
            a += tl.load(bias_ptr + first).to(tl.float32)
            b += tl.load(bias_ptr + first + HALF).to(tl.float32)
        _store(a, b, m, d, head, page, offset, cos, sin, True, q_ptr, k_ptr, v_ptr, k_page, k_slot, k_head, v_page, v_slot,
               v_head, D, HEADS, KV_HEADS)  # fmt: skip


@jit(do_not_specialize=["M"])
def _tile_kernel(
    x_ptr, squares_ptr, w_ptr, bias_ptr, cos_sin_ptr, rows_ptr, position_ptr, table_ptr, q_ptr, k_ptr, v_ptr,
    part_ptr, arrived_ptr, eps, table_row, k_page, k_slot, k_head, v_page, v_slot, v_head, M,
    BM: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    R: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, PAGE: tl.constexpr,
    BIAS: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = D // 2
    split = tl.program_id(2)
    pair = tl.program_id(1) * R + tl.arange(0, R)
    head = tl.program_id(1) * R // HALF
    d = pair % HALF
    first = head * D + d
    if PDL:
        fetch_ahead(w_ptr, first, split, K, BK, SPLITS)
        fetch_ahead(w_ptr, first + HALF, split, K, BK, SPLITS)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    present = m < M
    follow(PDL)
    slot = tl.load(rows_ptr + m, mask=present, other=0)
    page, offset, cos, sin = _place(slot[None, :], d[:, None], head, present[None, :], present[None, :], cos_sin_ptr,
                                    position_ptr, table_ptr, table_row, D, HEADS, KV_HEADS, PAGE)  # fmt: skip
    factor = norm_factor(squares_ptr, m, present, eps, PARTS, K, ROWS)[None, :]
    a, b = tile_product(x_ptr, m, present, w_ptr, first, first + HALF, split, K, BM, R, BK, SPLITS, True, STAGES)
    a, b, last = add_splits(a, b, part_ptr, arrived_ptr, split, BM, R, SPLITS, True)
    if last:
        a *= factor
        b *= factor
        if BIAS:
            a += tl.load(bias_ptr + first).to(tl.float32)[:, None]
            b += tl.load(bias_ptr + first + HALF).to(tl.float32)[:, None]
        _store(a, b, m[None, :], d[:, None], head, page, offset, cos, sin, present[None, :], q_ptr, k_ptr, v_ptr,
               k_page, k_slot, k_head, v_page, v_slot, v_head, D, HEADS, KV_HEADS)  # fmt: skip


@jit
def _rotate_kernel(
    product_ptr, squares_ptr, bias_ptr, cos_sin_ptr, rows_ptr, position_ptr, table_ptr, q_ptr, k_ptr, v_ptr,
    eps, table_row, k_page, k_slot, k_head, v_page, v_slot, v_head,
    K: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, BH: tl.constexpr, HALVES: tl.constexpr,
    PAGE: tl.constexpr, BIAS: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = D // 2
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    row = tl.program_id(1)
    head = (tl.program_id(0) * BH + tl.arange(0, BH))[:, None]
    d = tl.arange(0, HALVES)[None, :]
    m = row + tl.arange(0, 1)
    slot = tl.load(rows_ptr + row)
    position = tl.load(position_ptr + slot)
    page = tl.load(table_ptr + slot * table_row + position // PAGE).to(tl.int64)
    offset = position % PAGE
    cos = tl.load(cos_sin_ptr + position * D + d, mask=d < HALF, other=1.0)
    sin = tl.load(cos_sin_ptr + position * D + HALF + d, mask=d < HALF, other=0.0)
    inside = (head < ALL) & (d < HALF)
    follow(PDL)
    at = product_ptr + row.to(tl.int64) * (ALL * D) + head * D + d
    a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    factor = norm_factor(squares_ptr, m, m >= 0, eps, PARTS, K, ROWS)[:, None]
    a *= factor
    b *= factor
    if BIAS:
        a += tl.load(bias_ptr + head * D + d, mask=inside, other=0.0).to(tl.float32)
        b += tl.load(bias_ptr + head * D + HALF + d, mask=inside, other=0.0).to(tl.float32)
    low = (a * cos - b * sin).to(q_ptr.dtype.element_ty)
    high = (b * cos + a * sin).to(q_ptr.dtype.element_ty)
    to_q = q_ptr + row.to(tl.int64) * (HEADS * D) + head * D + d
    tl.store(to_q, low, mask=inside & (head < HEADS))
    tl.store(to_q + HALF, high, mask=inside & (head < HEADS))
    is_k = inside & (head >= HEADS) & (head < HEADS + KV_HEADS)
    to_k = k_ptr + page * k_page + offset * k_slot + (head - HEADS) * k_head + d
    tl.store(to_k, low, mask=is_k)
    tl.store(to_k + HALF, high, mask=is_k)
    is_v = inside & (head >= HEADS + KV_HEADS)
    to_v = v_ptr + page * v_page + offset * v_slot + (head - HEADS - KV_HEADS) * v_head + d
    tl.store(to_v, a.to(v_ptr.dtype.element_ty), mask=is_v)
    tl.store(to_v + HALF, b.to(v_ptr.dtype.element_ty), mask=is_v)


@jit
def _place(
    slot, d, head, present, inside, cos_sin_ptr, position_ptr, table_ptr, table_row,
    D: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Where a slot's new token lies (page, offset), and cos and sin of its position for pairs d; values are not rotated.

    present masks slots, inside [slots and pairs].

    Three loads, each the next one's address: asked for before the product, they are there when it is done.
    """
    position = tl.load(position_ptr + slot, mask=present, other=0)
    page = tl.load(table_ptr + slot * table_row + position // PAGE, mask=present, other=0).to(tl.int64)
    turned = inside & (head < HEADS + KV_HEADS)
    cos = tl.load(cos_sin_ptr + position * D + d, mask=turned, other=1.0)
    sin = tl.load(cos_sin_ptr + position * D + D // 2 + d, mask=turned, other=0.0)
    return page, position % PAGE, cos, sin


@jit
def _store(
    a, b, m, d, head, page, offset, cos, sin, present, q_ptr, k_ptr, v_ptr, k_page, k_slot, k_head, v_page, v_slot, v_head,
    D: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
):  # fmt: skip
    """Rotate the pairs (a, b) of `head` and store them; m, d and present broadcast to their shape."""
    rotated = a * cos - b * sin
    b = b * cos + a * sin
    if head < HEADS:
        at = q_ptr + (m * HEADS + head) * D + d
    elif head < HEADS + KV_HEADS:
        at = k_ptr + page * k_page + offset * k_slot + (head - HEADS) * k_head + d
    else:
        at = v_ptr + page * v_page + offset * v_slot + (head - HEADS - KV_HEADS) * v_head + d
    # a dump slot's rows all write the same place; nobody reads it
    tl.store(at, rotated.to(q_ptr.dtype.element_ty), mask=present)
    tl.store(at + D // 2, b.to(q_ptr.dtype.element_ty), mask=present)


def qkv(
    x: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, cos_sin: torch.Tensor,
    rows: torch.Tensor, state: DecodeState, k_cache: torch.Tensor, v_cache: torch.Tensor, q: torch.Tensor, *,
    eps: float, tiles: RowTiles, embed: bool, pdl: bool,
) -> None:  # fmt: skip
    """q [M, Hq, D] = rotated queries of rows `rows` (slots, int64 [M]); K and V go to their slot's page.

    x [M, K], or with `embed` the embedding [vocab, K] indexed by the slots' last tokens. weight [(Hq + 2 Hkv) D, K],
    cos_sin float32 [context, D], caches [pages, page_size, Hkv, D] of any strides with the last 1.
    """
    size = weight.shape[1]
    pairs, shape = _shape(q, k_cache, weight, bias, pdl)
    each = tiles.rows // 2
    assert x.is_contiguous() and q.shape[2] // 2 % each == 0
    _kernel[(pairs // each,)](
        x, gain, weight, weight if bias is None else bias, cos_sin, rows, state.last_token, state.position,
        state.block_tables, q, k_cache, v_cache, eps, state.block_tables.stride(0), *k_cache.stride()[:3],
        *v_cache.stride()[:3], M=q.shape[0], PAIRS=each, BK=tiles.chunk, CHUNKS=cdiv(size, tiles.chunk), EMBED=embed,
        num_warps=tiles.warps, **shape)  # fmt: skip


def qkv_tiles(
    stream: Stream, weight: torch.Tensor, bias: torch.Tensor | None, cos_sin: torch.Tensor, rows: torch.Tensor,
    state: DecodeState, k_cache: torch.Tensor, v_cache: torch.Tensor, q: torch.Tensor, *, eps: float, tiles: AnyTiles,
    pdl: bool, space: TileSpace,
) -> None:  # fmt: skip
    """The same from a residual stream that is scaled for this norm; tiles.rows counts pairs of rows."""
    pairs, shape = _shape(q, k_cache, weight, bias, pdl)
    inputs = (stream.scaled, stream.squares, weight, weight if bias is None else bias, cos_sin, rows, state.position,
              state.block_tables, q, k_cache, v_cache)  # fmt: skip
    strides = (eps, state.block_tables.stride(0), *k_cache.stride()[:3], *v_cache.stride()[:3])
    common = dict(M=q.shape[0], PARTS=stream.parts, ROWS=stream.rows, **tiles.options(q.shape[0], **shape))
    half = q.shape[2] // 2
    if not isinstance(tiles, TensorTiles):
        common["ALL"] = next_power_of_2(stream.parts)
    if isinstance(tiles, registers.RegisterTiles):
        assert half % (tiles.rows // 2) == 0
        registers.qkv_kernel[tiles.grid(2 * pairs, q.shape[0])](*inputs, *strides, **common)
    elif isinstance(tiles, streaming.StreamTiles):
        assert tiles.rows == q.shape[2]
        w_desc, x_desc = streaming.descriptors(weight, stream.scaled[: q.shape[0]], tiles)
        streaming.qkv_kernel[tiles.grid(2 * pairs, q.shape[0])](
            x_desc, stream.squares, w_desc, *inputs[3:], space.part, space.arrived, *strides, **common)  # fmt: skip
    else:
        assert half % tiles.rows == 0
        _tile_kernel[tiles.grid(pairs, q.shape[0])](*inputs, space.part, space.arrived, *strides, **common)


def qkv_library(
    stream: Stream, weight: torch.Tensor, bias: torch.Tensor | None, cos_sin: torch.Tensor, rows: torch.Tensor,
    state: DecodeState, k_cache: torch.Tensor, v_cache: torch.Tensor, product: torch.Tensor, q: torch.Tensor, *, eps: float,
    pdl: bool,
) -> None:  # fmt: skip
    """The same by cuBLAS and one kernel behind it; product [M, (Hq + 2 Hkv) D] is workspace."""
    count, heads, dim = q.shape
    torch.mm(stream.scaled[:count], weight.t(), out=product)
    _, shape = _shape(q, k_cache, weight, bias, pdl)
    each = 16  # heads of a program: with one head each, 256 rows of TinyLlama took 13 us instead of 2
    _rotate_kernel[(cdiv(heads + 2 * k_cache.shape[2], each), count)](
        product, stream.squares, weight if bias is None else bias, cos_sin, rows, state.position, state.block_tables, q,
        k_cache, v_cache, eps, state.block_tables.stride(0), *k_cache.stride()[:3], *v_cache.stride()[:3], BH=each,
        HALVES=next_power_of_2(dim // 2), PARTS=stream.parts, ROWS=stream.rows, num_warps=4, **shape)  # fmt: skip


def _shape(
    q: torch.Tensor, k_cache: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, pdl: bool
) -> tuple[int, dict[str, Any]]:
    """Pairs of rows of W, and what both kernels are specialised on."""
    _, heads, dim = q.shape
    page_size, kv_heads = k_cache.shape[1:3]
    assert weight.is_contiguous() and q.is_contiguous()
    return (heads + 2 * kv_heads) * dim // 2, dict(
        K=weight.shape[1], D=dim, HEADS=heads, KV_HEADS=kv_heads, PAGE=page_size, BIAS=bias is not None, PDL=pdl,
        **launch_options(pdl))  # fmt: skip


def qkv_torch(
    x: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, cos_sin: torch.Tensor,
    rows: torch.Tensor, state: DecodeState, k_cache: torch.Tensor, v_cache: torch.Tensor, q: torch.Tensor, *,
    eps: float, embed: bool,
) -> None:  # fmt: skip
    """Reference, in float32."""
    count, heads, dim = q.shape
    kv_heads, page_size = k_cache.shape[2], k_cache.shape[1]
    x = (x[state.last_token[rows]] if embed else x).float()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain.float()
    out = normed @ weight.float().T
    if bias is not None:
        out = out + bias.float()
    out = out.view(count, heads + 2 * kv_heads, dim)
    position = state.position[rows].long()
    cos, sin = cos_sin[position].unsqueeze(1).chunk(2, -1)
    low, high = out.chunk(2, -1)
    rotated = torch.cat((low * cos - high * sin, high * cos + low * sin), -1)
    q.copy_(rotated[:, :heads])
    page = state.block_tables[rows, position // page_size].long()
    k_cache[page, position % page_size] = rotated[:, heads : heads + kv_heads].to(k_cache.dtype)
    v_cache[page, position % page_size] = out[:, heads + kv_heads :].to(v_cache.dtype)


def bytes_moved(rows: int, out_features: int, in_features: int, element_size: int) -> int:
    """The weight once; x read and the result written per row."""
    return element_size * (out_features * in_features + rows * (in_features + out_features))


def flops(rows: int, out_features: int, in_features: int) -> int:
    return 2 * rows * out_features * in_features
