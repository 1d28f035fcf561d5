"""Decode kernel 4 of a layer: RMSNorm, gate and up projections, silu(gate) * up; one launch.

A program owns rows n of the gate and the same rows of the up projection, so the product never leaves its registers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from model_core.kernels.decode import registers, streaming
from model_core.kernels.decode.products import RowTiles, dot_rows, follow, launch_options, load_rows, load_x
from model_core.kernels.decode.tiles import (
    Stream,
    TensorTiles,
    TileSpace,
    add_splits,
    columns,
    fetch_ahead,
    norm_factor,
    tile_product,
)
from model_core.kernels.runtime import cdiv, jit, next_power_of_2, tl

AnyTiles = TensorTiles | registers.RegisterTiles | streaming.StreamTiles

@jit
def _kernel(
    x_ptr, gain_ptr, w_ptr, out_ptr, eps,
    M: tl.constexpr, INNER: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * R + tl.arange(0, R)
    gate_w = load_rows(w_ptr, n, K, BK, CHUNKS)
    up_w = load_rows(w_ptr, n + INNER, K, BK, CHUNKS)
    follow(PDL)
    for m in tl.static_range(M):
        x, factor = load_x(x_ptr + m * K, gain_ptr, K, BK, CHUNKS, True, eps)
        gate = dot_rows(gate_w, x, CHUNKS) * factor
        up = dot_rows(up_w, x, CHUNKS) * factor
        tl.store(out_ptr + m * INNER + n, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty))


@jit(do_not_specialize=["M"])
def _tile_kernel(
    x_ptr, squares_ptr, w_ptr, out_ptr, part_ptr, arrived_ptr, eps, M,
    BM: tl.constexpr, INNER: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1) * R + tl.arange(0, R)
    split = tl.program_id(2)
    if PDL:
        fetch_ahead(w_ptr, n, split, K, BK, SPLITS)
        fetch_ahead(w_ptr, n + INNER, split, K, BK, SPLITS)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    present = m < M
    follow(PDL)
    factor = norm_factor(squares_ptr, m, present, eps, PARTS, K, ROWS)[None, :]
    gate, up = tile_product(x_ptr, m, present, w_ptr, n, n + INNER, split, K, BM, R, BK, SPLITS, True, STAGES)
    gate, up, last = add_splits(gate, up, part_ptr, arrived_ptr, split, BM, R, SPLITS, True)
    if last:
        gate *= factor
        up *= factor
        out = (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + m[None, :] * INNER + n[:, None], out, mask=present[None, :])


@jit(do_not_specialize=["M"])
def _activate_kernel(
    product_ptr, squares_ptr, out_ptr, eps, M,
    BM: tl.constexpr, INNER: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    present = m < M
    follow(PDL)
    factor = norm_factor(squares_ptr, m, present, eps, PARTS, K, ROWS)[:, None]
    at = product_ptr + m[:, None] * (2 * INNER) + n[None, :]
    mask = present[:, None] & (n < INNER)[None, :]
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32) * factor
    up = tl.load(at + INNER, mask=mask, other=0.0).to(tl.float32) * factor
    tl.store(out_ptr + m[:, None] * INNER + n[None, :], (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=mask)


def gate_up(
    x: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, eps: float, tiles: RowTiles, pdl: bool
) -> None:
    """out [M, I] = silu(norm(x) @ gate.T) * (norm(x) @ up.T); weight [2 I, K] holds gate, then up. tiles.rows counts
    rows of both."""
    inner, size, each = weight.shape[0] // 2, weight.shape[1], tiles.rows // 2
    assert inner % each == 0 and weight.is_contiguous() and x.is_contiguous() and out.is_contiguous()
    _kernel[(inner // each,)](
        x, gain, weight, out, eps, M=out.shape[0], INNER=inner, K=size, R=each, BK=tiles.chunk,
        CHUNKS=cdiv(size, tiles.chunk), PDL=pdl, num_warps=tiles.warps, **launch_options(pdl))  # fmt: skip


def gate_up_tiles(
    stream: Stream, weight: torch.Tensor, out: torch.Tensor, *, eps: float, tiles: AnyTiles, pdl: bool, space: TileSpace
) -> None:
    """The same from a residual stream that is scaled for this norm; TensorTiles' rows count those of one half."""
    inner, size, count = weight.shape[0] // 2, weight.shape[1], out.shape[0]
    assert weight.is_contiguous() and out.is_contiguous()
    common = dict(M=count, INNER=inner, K=size, PARTS=stream.parts, ROWS=stream.rows, PDL=pdl,
                  **tiles.options(count, **launch_options(pdl)))  # fmt: skip
    if not isinstance(tiles, TensorTiles):
        common["ALL"] = next_power_of_2(stream.parts)
    if isinstance(tiles, registers.RegisterTiles):
        registers.gate_up_kernel[tiles.grid(2 * inner, count)](stream.scaled, stream.squares, weight, out, eps, **common)
    elif isinstance(tiles, streaming.StreamTiles):
        w_desc, x_desc = streaming.descriptors(weight, stream.scaled[:count], tiles)
        streaming.gate_up_kernel[tiles.grid(inner, count)](
            x_desc, stream.squares, w_desc, out, space.part, space.arrived, eps, **common)  # fmt: skip
    else:
        _tile_kernel[tiles.grid(inner, count)](
            stream.scaled, stream.squares, weight, out, space.part, space.arrived, eps, **common)  # fmt: skip


def gate_up_library(
    stream: Stream, weight: torch.Tensor, product: torch.Tensor, out: torch.Tensor, *, eps: float, pdl: bool
) -> None:
    """The same by cuBLAS and one kernel behind it; product [M, 2 I] is workspace."""
    count, inner = out.shape
    torch.mm(stream.scaled[:count], weight.t(), out=product)
    rows = min(4, columns(count))
    _activate_kernel[(cdiv(inner, 512), cdiv(count, rows))](
        product, stream.squares, out, eps, M=count, BM=rows, INNER=inner, K=weight.shape[1], BN=512, PARTS=stream.parts,
        ROWS=stream.rows, PDL=pdl, num_warps=4, **launch_options(pdl))  # fmt: skip


def gate_up_torch(x: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, eps: float) -> None:
    """Reference, in float32."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * gain.float()
    gate, up = (normed @ weight.float().T).chunk(2, -1)
    out.copy_(F.silu(gate) * up)


def bytes_moved(rows: int, inner: int, in_features: int, element_size: int) -> int:
    """The weight once; x read and the result written per row."""
    return element_size * (2 * inner * in_features + rows * (in_features + inner))


def flops(rows: int, inner: int, in_features: int) -> int:
    return 4 * rows * inner * in_features
