"""Decode kernels 3 and 5 of a layer: a projection added to the residual stream (attention output, MLP down)."""

from __future__ import annotations

import torch

from model_core.kernels.decode.products import RowTiles, dot_rows, follow, launch_options, load_rows, load_x
from model_core.kernels.decode.tiles import TensorTiles, TileSpace, add_splits, columns, tile_product
from model_core.kernels.runtime import cdiv, jit, tl


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
        x, _ = load_x(x_ptr + m * K, x_ptr, K, BK, CHUNKS, False, 0.0)
        base_row = tl.load(token_ptr + tl.load(rows_ptr + m)) if EMBED else m
        base = tl.load(base_ptr + base_row * N + n).to(tl.float32)
        tl.store(out_ptr + m * N + n, (base + dot_rows(w, x, CHUNKS)).to(out_ptr.dtype.element_ty))


@jit
def _tile_kernel(
    x_ptr, w_ptr, base_ptr, out_ptr, rows_ptr, token_ptr, part_ptr, arrived_ptr,
    M: tl.constexpr, BM: tl.constexpr, N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, EMBED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    n = tile * R + tl.arange(0, R)
    follow(PDL)
    m = tl.arange(0, BM)
    present = m < M
    acc, other, squares = tile_product(x_ptr, m, present, w_ptr, n, n, x_ptr, split, K, BM, R, BK, SPLITS, False, False, STAGES)
    acc, other, squares, last = add_splits(acc, other, squares, part_ptr, arrived_ptr, tile, split, BM, R, SPLITS, False, False)
    if last:
        base_row = m
        if EMBED:
            base_row = tl.load(token_ptr + tl.load(rows_ptr + m, mask=present, other=0), mask=present, other=0)
        base = tl.load(base_ptr + base_row[None, :] * N + n[:, None], mask=present[None, :], other=0.0).to(tl.float32)
        tl.store(out_ptr + m[None, :] * N + n[:, None], (base + acc).to(out_ptr.dtype.element_ty), mask=present[None, :])


def project(
    x: torch.Tensor, weight: torch.Tensor, base: torch.Tensor, out: torch.Tensor, rows: torch.Tensor,
    last_token: torch.Tensor, *, tiles: RowTiles | TensorTiles, embed: bool, pdl: bool, space: TileSpace | None = None,
) -> None:  # fmt: skip
    """out [M, N] = base + x [M, K] @ weight [N, K].T; base is out itself, or with `embed` the embedding [vocab, N] at
    the last tokens of the slots `rows`."""
    size, width = weight.shape
    assert size % tiles.rows == 0 and weight.is_contiguous() and x.is_contiguous() and out.is_contiguous()
    inputs = (x, weight, base, out, rows, last_token)
    shape = dict(M=out.shape[0], N=size, K=width, R=tiles.rows, BK=tiles.chunk, EMBED=embed, PDL=pdl,
                 num_warps=tiles.warps, **launch_options(pdl))  # fmt: skip
    if isinstance(tiles, RowTiles):
        _kernel[(size // tiles.rows,)](*inputs, CHUNKS=cdiv(width, tiles.chunk), **shape)
    else:
        assert space is not None
        _tile_kernel[(size // tiles.rows, tiles.splits)](
            *inputs, space.part, space.arrived, BM=columns(out.shape[0]), SPLITS=tiles.splits, STAGES=tiles.stages, **shape
        )


def project_torch(
    x: torch.Tensor, weight: torch.Tensor, base: torch.Tensor, out: torch.Tensor, rows: torch.Tensor,
    last_token: torch.Tensor, *, embed: bool,
) -> None:  # fmt: skip
    """Reference, in float32."""
    start = (base[last_token[rows]] if embed else base).float()
    out.copy_(start + x.float() @ weight.float().T)


def bytes_moved(rows: int, out_features: int, in_features: int, element_size: int) -> int:
    """The weight once; x read, the residual read and written per row."""
    return element_size * (out_features * in_features + rows * (in_features + 2 * out_features))


def flops(rows: int, out_features: int, in_features: int) -> int:
    return 2 * rows * out_features * in_features
