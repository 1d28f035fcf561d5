"""Decode kernels 3 and 5 of a layer: a projection added to the residual stream (attention output, MLP down)."""

from __future__ import annotations

import torch

from model_core.kernels.decode import registers, streaming
from model_core.kernels.decode.embed import write_stream_torch
from model_core.kernels.decode.products import RowTiles, dot_rows, follow, launch_options, load_rows, load_x
from model_core.kernels.decode.tiles import (
    Stream,
    TensorTiles,
    TileSpace,
    add_splits,
    columns,
    fetch_ahead,
    part_width,
    tile_product,
    write_stream,
)
from model_core.kernels.runtime import cdiv, jit, tl

AnyTiles = TensorTiles | registers.RegisterTiles | streaming.StreamTiles

@jit
def _kernel(
    x_ptr, w_ptr, base_ptr, out_ptr, rows_ptr, token_ptr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, CHUNKS: tl.constexpr,
    EMBED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * R + tl.arange(0, R)
    w = load_rows(w_ptr, n, K, BK, CHUNKS)
    follow(PDL)
    for m in tl.static_range(M):
        base_row = tl.load(token_ptr + tl.load(rows_ptr + m)) if EMBED else m
        base = tl.load(base_ptr + base_row * N + n).to(tl.float32)  # on its way while the product is computed
        x, _ = load_x(x_ptr + m * K, x_ptr, K, BK, CHUNKS, False, 0.0)
        tl.store(out_ptr + m * N + n, (base + dot_rows(w, x, CHUNKS)).to(out_ptr.dtype.element_ty))


@jit(do_not_specialize=["M"])
def _tile_kernel(
    x_ptr, w_ptr, gain_ptr, residual_ptr, scaled_ptr, squares_ptr, part_ptr, arrived_ptr, M,
    BM: tl.constexpr, N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1) * R + tl.arange(0, R)
    split = tl.program_id(2)
    if PDL:
        fetch_ahead(w_ptr, n, split, K, BK, SPLITS)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    present = m < M
    follow(PDL)
    acc, other = tile_product(x_ptr, m, present, w_ptr, n, n, split, K, BM, R, BK, SPLITS, False, STAGES)
    base = tl.load(residual_ptr + m[None, :] * N + n[:, None], mask=present[None, :], other=0.0).to(tl.float32)
    acc, other, last = add_splits(acc, other, part_ptr, arrived_ptr, split, BM, R, SPLITS, False)
    if last:
        write_stream(base + acc, m, n, tl.program_id(1), present, residual_ptr, scaled_ptr, squares_ptr, gain_ptr, N, ROWS)


@jit(do_not_specialize=["M"])
def _add_kernel(
    product_ptr, gain_ptr, residual_ptr, scaled_ptr, squares_ptr, M,
    BM: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    present = m < M
    follow(PDL)
    at = m[None, :] * N + n[:, None]
    value = tl.load(product_ptr + at, mask=present[None, :], other=0.0).to(tl.float32)
    value += tl.load(residual_ptr + at, mask=present[None, :], other=0.0).to(tl.float32)
    write_stream(value, m, n, tl.program_id(0), present, residual_ptr, scaled_ptr, squares_ptr, gain_ptr, N, ROWS)


def project(
    x: torch.Tensor, weight: torch.Tensor, base: torch.Tensor, out: torch.Tensor, rows: torch.Tensor,
    last_token: torch.Tensor, *, tiles: RowTiles, embed: bool, pdl: bool,
) -> None:  # fmt: skip
    """out [M, N] = base + x [M, K] @ weight [N, K].T; base is out itself, or with `embed` the embedding [vocab, N] at
    the last tokens of the slots `rows`."""
    size, width = weight.shape
    assert size % tiles.rows == 0 and weight.is_contiguous() and x.is_contiguous() and out.is_contiguous()
    _kernel[(size // tiles.rows,)](
        x, weight, base, out, rows, last_token, M=out.shape[0], N=size, K=width, R=tiles.rows, BK=tiles.chunk,
        CHUNKS=cdiv(width, tiles.chunk), EMBED=embed, PDL=pdl, num_warps=tiles.warps, **launch_options(pdl))  # fmt: skip


def project_tiles(
    x: torch.Tensor, weight: torch.Tensor, gain: torch.Tensor, stream: Stream, *, tiles: AnyTiles, pdl: bool,
    space: TileSpace,
) -> None:  # fmt: skip
    """stream += x [M, K] @ weight [N, K].T, scaled for the norm of `gain` [N] that comes next."""
    size, width = weight.shape
    count = x.shape[0]
    assert weight.is_contiguous() and x.is_contiguous()
    stream.parts = size // tiles.rows
    common = dict(M=count, N=size, K=width, ROWS=stream.rows, PDL=pdl, **tiles.options(count, **launch_options(pdl)))
    buffers = (x, weight, gain, stream.residual, stream.scaled, stream.squares)
    if isinstance(tiles, registers.RegisterTiles):
        registers.project_kernel[tiles.grid(size, count)](*buffers, **common)
    elif isinstance(tiles, streaming.StreamTiles):
        w_desc, x_desc = streaming.descriptors(weight, x, tiles)
        streaming.project_kernel[tiles.grid(size, count)](
            x_desc, w_desc, *buffers[2:], space.part, space.arrived, **common)  # fmt: skip
    else:
        _tile_kernel[tiles.grid(size, count)](*buffers, space.part, space.arrived, **common)


def project_library(
    x: torch.Tensor, weight: torch.Tensor, gain: torch.Tensor, stream: Stream, product: torch.Tensor, *, pdl: bool
) -> None:
    """The same by cuBLAS and one kernel behind it; product [M, N] is workspace."""
    count, hidden = product.shape
    torch.mm(x, weight.t(), out=product)
    width = part_width(hidden)
    stream.parts = hidden // width
    rows = min(4, columns(count))
    _add_kernel[(stream.parts, cdiv(count, rows))](
        product, gain, stream.residual, stream.scaled, stream.squares, M=count, BM=rows, N=hidden, BN=width,
        ROWS=stream.rows, PDL=pdl, num_warps=4, **launch_options(pdl))  # fmt: skip


def project_torch(
    x: torch.Tensor, weight: torch.Tensor, base: torch.Tensor, out: torch.Tensor, rows: torch.Tensor,
    last_token: torch.Tensor, *, embed: bool,
) -> None:  # fmt: skip
    """Reference, in float32."""
    start = (base[last_token[rows]] if embed else base).float()
    out.copy_(start + x.float() @ weight.float().T)


def project_tiles_torch(x: torch.Tensor, weight: torch.Tensor, gain: torch.Tensor, stream: Stream) -> None:
    """Reference, in float32."""
    write_stream_torch(stream.residual[: x.shape[0]].float() + x.float() @ weight.float().T, gain, stream)


def bytes_moved(rows: int, out_features: int, in_features: int, element_size: int) -> int:
    """The weight once; x read, the residual read and written per row."""
    return element_size * (out_features * in_features + rows * (in_features + 2 * out_features))


def flops(rows: int, out_features: int, in_features: int) -> int:
    return 2 * rows * out_features * in_features
