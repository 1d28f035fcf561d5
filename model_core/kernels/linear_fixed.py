"""x @ weight.T (+ bias) of which a row is the same bits whatever the other rows and however many: for `deterministic: true`.

cuBLAS chooses tiles, and whether to split K, by the number of rows; each choice adds in another order. Here every element is
one accumulator that takes the products of K in ascending order, BLOCK_K of them at a time, by the same tensor core
instruction: x is always its left operand, in tiles of at least 64 rows (wgmma m64nNk16 on Hopper, mma m16n8k16 before), and K
is never split. How many rows and columns a program has then only says who computes an element, not how; so tiles may follow
the number of rows. (He 2025, "Defeating Nondeterminism in LLM Inference", keeps one tile for all sizes instead.)
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from model_core.kernels.runtime import cdiv, jit, tl

BLOCK_K = 64  # never depends on anything but the dtype: what a row's additions are grouped by
_BLOCK_K_FLOAT32 = 32
_PROGRAMS = 128  # about one for each multiprocessor of a large GPU
_SHARED = 227 << 10  # bytes of shared memory that a program may have on Hopper; asked of the device where there is one


class FixedTiles(NamedTuple):
    """rows x columns of the result per program, and its launch shape."""

    rows: int
    columns: int
    warps: int
    stages: int


_FEW = [FixedTiles(64, 128, 4, 4), FixedTiles(64, 64, 4, 6), FixedTiles(64, 32, 4, 8), FixedTiles(64, 16, 4, 8)]
_MANY = [FixedTiles(128, 256, 8, 4), FixedTiles(128, 128, 8, 4), *_FEW]
_FLOAT32 = FixedTiles(32, 32, 4, 1)  # multiplied on the plain cores


@jit(do_not_specialize=["rows"])
def _kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, rows, N, K,
    BIAS: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    # Neighbours in time share a tile of the weight, the larger operand: it is read from memory once.
    tiles_m = tl.cdiv(rows, BLOCK_M)
    m = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, DEPTH)
    x_at = x_ptr + (m.to(tl.int64) * K)[:, None] + k[None, :]
    weight_at = weight_ptr + (n.to(tl.int64) * K)[None, :] + k[:, None]
    in_m, in_n = (m < rows)[:, None], (n < N)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, K, DEPTH, num_stages=STAGES):
        if EVEN_K:
            x = tl.load(x_at + start, mask=in_m, other=0.0)
            weight = tl.load(weight_at + start, mask=in_n, other=0.0)
        else:
            x = tl.load(x_at + start, mask=in_m & (k < K - start)[None, :], other=0.0)
            weight = tl.load(weight_at + start, mask=in_n & (k < K - start)[:, None], other=0.0)
        acc = tl.dot(x, weight, acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y_at = y_ptr + (m.to(tl.int64) * N)[:, None] + n[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=in_m & in_n)


def fixed_tiles(rows: int, out_features: int, dtype: torch.dtype, shared: int = _SHARED) -> FixedTiles:
    """Few rows: the widest tile that still gives every multiprocessor a program, for bandwidth. Many: the least estimated time,
    waves of programs times arithmetic and operand traffic of one. A model, not a measurement; the bits are the same.

    shared: bytes of shared memory of a program; fewer stages on small GPUs.
    """
    if dtype == torch.float32:
        return _FLOAT32
    if rows <= 64:
        found = next((tiles for tiles in _FEW if cdiv(out_features, tiles.columns) >= _PROGRAMS), _FEW[-1])
    else:

        def time(tiles: FixedTiles) -> int:
            waves = cdiv(cdiv(rows, tiles.rows) * cdiv(out_features, tiles.columns), _PROGRAMS)
            return waves * (tiles.rows * tiles.columns + 24 * (tiles.rows + tiles.columns))

        found = min(_MANY, key=time)
    stage = (found.rows + found.columns) * BLOCK_K * dtype.itemsize
    return found._replace(stages=max(1, min(found.stages, shared // stage)))


def linear_fixed(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, out_dtype: torch.dtype | None = None,
    tiles: FixedTiles | None = None,
) -> torch.Tensor:  # fmt: skip
    """Triton. x [M, K] and weight [N, K], contiguous and of one dtype (float32, bfloat16, float16), bias [N] -> [M, N].

    Sums, the bias included, are float32 and rounded once, to out_dtype (x's by default). tiles: others than
    `fixed_tiles` says, for tests.
    """
    (rows, depth), outputs = x.shape, weight.shape[0]
    assert weight.shape[1] == depth and x.dtype == weight.dtype and x.is_contiguous() and weight.is_contiguous()
    y = torch.empty((rows, outputs), dtype=out_dtype or x.dtype, device=x.device)
    if not rows:
        return y
    tiles = tiles or fixed_tiles(rows, outputs, x.dtype, _shared_memory(x.device))
    block_k = _BLOCK_K_FLOAT32 if x.dtype == torch.float32 else BLOCK_K
    _kernel[(cdiv(rows, tiles.rows) * cdiv(outputs, tiles.columns),)](
        x, weight, weight if bias is None else bias, y, rows, outputs, depth, BIAS=bias is not None,
        EVEN_K=depth % block_k == 0, BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, DEPTH=block_k, STAGES=tiles.stages,
        num_warps=tiles.warps)  # fmt: skip
    return y


def linear_fixed_torch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Reference: the same roundings, but rows whose bits depend on how many there are."""
    offset = None if bias is None else bias.float()
    return F.linear(x.float(), weight.float(), offset).to(out_dtype or x.dtype)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that one program may have."""
    if device.type != "cuda":
        return _SHARED
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 48 << 10)


def bytes_moved(rows: int, out_features: int, in_features: int, element_size: int, out_size: int) -> int:
    """x and the weight read once, the result (out_size bytes an element) written once."""
    return (rows + out_features) * in_features * element_size + rows * out_features * out_size


def flops(rows: int, out_features: int, in_features: int) -> int:
    """A product and a sum per weight and row."""
    return 2 * rows * out_features * in_features
