"""The end of a decode step, first half: final RMSNorm and the vocabulary projection."""

from __future__ import annotations

from typing import Any

import torch

from model_core.kernels.decode import registers, streaming
from model_core.kernels.decode.products import RowTiles, dot_rows, follow, launch_options, load_rows, load_x
from model_core.kernels.decode.tiles import Stream, TensorTiles, fetch_ahead, norm_factor, tile_product
from model_core.kernels.runtime import cdiv, jit, next_power_of_2, tl

AnyTiles = TensorTiles | registers.RegisterTiles | streaming.StreamTiles

@jit
def _kernel(
    x_ptr, gain_ptr, w_ptr, out_ptr, eps,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * R + tl.arange(0, R)
    w = load_rows(w_ptr, n, K, BK, CHUNKS)
    follow(PDL)
    for m in tl.static_range(M):
        x, factor = load_x(x_ptr + m * K, gain_ptr, K, BK, CHUNKS, True, eps)
        tl.store(out_ptr + m * N + n, dot_rows(w, x, CHUNKS) * factor)


@jit(do_not_specialize=["M"])
def _tile_kernel(
    x_ptr, squares_ptr, w_ptr, out_ptr, eps, M,
    BM: tl.constexpr, N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1) * R + tl.arange(0, R)
    if PDL:
        fetch_ahead(w_ptr, n, 0, K, BK, 1)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    present = m < M
    follow(PDL)
    factor = norm_factor(squares_ptr, m, present, eps, PARTS, K, ROWS)
    acc, _ = tile_product(x_ptr, m, present, w_ptr, n, n, 0, K, BM, R, BK, SPLITS, False, STAGES)
    tl.store(out_ptr + m.to(tl.int64)[None, :] * N + n[:, None], acc * factor[None, :], mask=present[None, :])


@jit
def _normalise_kernel(
    x_ptr, squares_ptr, out_ptr, eps, K: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    m = tl.program_id(1) + tl.arange(0, 1)
    follow(PDL)
    factor = norm_factor(squares_ptr, m, m >= 0, eps, PARTS, K, ROWS)[:, None]
    at = m[:, None] * K + k[None, :]
    x = tl.load(x_ptr + at, mask=(k < K)[None, :], other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (x * factor).to(out_ptr.dtype.element_ty), mask=(k < K)[None, :])


def head(
    x: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor, logits: torch.Tensor, *, eps: float, tiles: RowTiles, pdl: bool
) -> None:
    """logits float32 [M, vocab] = norm(x [M, K]) @ weight [vocab, K].T"""
    size, width = weight.shape
    assert size % tiles.rows == 0 and weight.is_contiguous() and x.is_contiguous() and logits.is_contiguous()
    _kernel[(size // tiles.rows,)](
        x, gain, weight, logits, eps, M=logits.shape[0], N=size, K=width, R=tiles.rows, BK=tiles.chunk,
        CHUNKS=cdiv(width, tiles.chunk), PDL=pdl, num_warps=tiles.warps, **launch_options(pdl))  # fmt: skip


def head_tiles(
    stream: Stream, weight: torch.Tensor, logits: torch.Tensor, *, eps: float, tiles: AnyTiles, pdl: bool
) -> None:
    """The same from a residual stream that is scaled for the final norm; tiles.splits is 1."""
    size, width = weight.shape
    count = logits.shape[0]
    assert weight.is_contiguous() and logits.is_contiguous() and getattr(tiles, "splits", 1) == 1
    kernel = registers.head_kernel if isinstance(tiles, registers.RegisterTiles) else _tile_kernel
    x: Any = stream.scaled
    w: Any = weight
    if isinstance(tiles, streaming.StreamTiles):
        kernel = streaming.head_kernel
        w, x = streaming.descriptors(weight, stream.scaled[:count], tiles)
    more = {} if isinstance(tiles, TensorTiles) else {"ALL": next_power_of_2(stream.parts)}
    kernel[tiles.grid(size, count)](
        x, stream.squares, w, logits, eps, M=count, N=size, K=width, PARTS=stream.parts, ROWS=stream.rows,
        PDL=pdl, **more, **tiles.options(count, **launch_options(pdl)))  # fmt: skip


def head_library(
    stream: Stream, weight: torch.Tensor, normed: torch.Tensor, logits: torch.Tensor, *, eps: float, pdl: bool
) -> None:
    """The same by one kernel and cuBLAS behind it; normed [M, K] is workspace."""
    count, width = normed.shape
    _normalise_kernel[(cdiv(width, 1024), count)](
        stream.scaled, stream.squares, normed, eps, K=width, BK=1024, PARTS=stream.parts, ROWS=stream.rows, PDL=pdl,
        num_warps=4, **launch_options(pdl))  # fmt: skip
    if normed.dtype == torch.float32:
        torch.mm(normed, weight.t(), out=logits)
    else:
        torch.mm(normed, weight.t(), out_dtype=torch.float32, out=logits)


def head_torch(x: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor, logits: torch.Tensor, *, eps: float) -> None:
    """Reference, in float32."""
    wide = x.float()
    logits.copy_(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * gain.float() @ weight.float().T)


def bytes_moved(rows: int, vocab: int, in_features: int, element_size: int) -> int:
    """The weight once; x read and float32 logits written per row."""
    return element_size * (vocab * in_features + rows * in_features) + 4 * rows * vocab


def flops(rows: int, vocab: int, in_features: int) -> int:
    return 2 * rows * vocab * in_features
