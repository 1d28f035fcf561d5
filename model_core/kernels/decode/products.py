"""Shared by the decode kernels: x @ W.T for a few rows of x, each program streaming a few rows of W once.

At decode every weight is read once per step, so a program's job is to keep loads in flight. Its rows of W are loaded
before the programmatic dependency wait (`gdc_wait`, Hopper): they are constants, so they arrive while the kernel before
still runs. What earlier kernels of the chain wrote (x, the residual, positions) is read after it.
"""

from dataclasses import dataclass
from typing import Any

import torch

from model_core.kernels.runtime import jit, tl, triton

if triton is not None and torch.cuda.is_available():
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
else:  # never reached in the interpreter: PDL is a constexpr there that is False

    def gdc_wait():
        raise AssertionError("programmatic dependent launch needs a GPU")

    gdc_launch_dependents = gdc_wait


def chains_launches(device: torch.device) -> bool:
    """Whether kernels may be launched with `launch_pdl=True` (compute capability 9.0 and above)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@dataclass(frozen=True)
class RowTiles:
    """rows: rows of W per program (pairs count twice); chunk: columns per register tile; warps per program."""

    rows: int
    chunk: int
    warps: int


def launch_options(pdl: bool) -> dict[str, Any]:
    """Only CUDA's backend knows the option."""
    return {"launch_pdl": True} if pdl else {}


@jit
def load_rows(w_ptr, row, K: tl.constexpr, BK: tl.constexpr, CHUNKS: tl.constexpr):
    """Rows `row` [R] of W [N, K], as CHUNKS tiles [R, BK] that stay in registers; columns past K are 0."""
    k = tl.arange(0, BK)
    at = w_ptr + row.to(tl.int64)[:, None] * K + k[None, :]
    tiles = ()
    for chunk in tl.static_range(CHUNKS):
        if (chunk + 1) * BK <= K:
            tile = tl.load(at + chunk * BK, eviction_policy="evict_first")
        else:
            tile = tl.load(at + chunk * BK, mask=(chunk * BK + k < K)[None, :], other=0.0, eviction_policy="evict_first")
        tiles = tiles + (tile,)  # type: ignore[assignment]
    return tiles


@jit
def follow(PDL: tl.constexpr):
    """Let the next kernel start its preamble, then wait until the one before has ended and its writes are visible."""
    announce(PDL)
    wait(PDL)


@jit
def announce(PDL: tl.constexpr):
    """The first half of `follow`, for a kernel whose own preamble takes long."""
    if PDL:
        gdc_launch_dependents()


@jit
def wait(PDL: tl.constexpr):
    """The second half of `follow`."""
    if PDL:
        gdc_wait()


@jit
def load_x(x_ptr, gain_ptr, K: tl.constexpr, BK: tl.constexpr, CHUNKS: tl.constexpr, NORM: tl.constexpr, eps):
    """One row x [K] as CHUNKS float32 tiles [BK], times the norm's gain, and the norm's factor 1 / rms(x).

    The factor is applied to finished products: the reduction for it then hides behind theirs, and x is not rounded.
    """
    k = tl.arange(0, BK)
    tiles = ()
    squares = tl.zeros([BK], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        inside = chunk * BK + k < K
        x = tl.load(x_ptr + chunk * BK + k, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            squares += x * x
            x = x * tl.load(gain_ptr + chunk * BK + k, mask=inside, other=0.0).to(tl.float32)
        tiles = tiles + (x,)  # type: ignore[assignment]
    factor = tl.rsqrt(tl.sum(squares, axis=0) / K + eps) if NORM else 1.0
    return tiles, factor


@jit
def dot_rows(w, x, CHUNKS: tl.constexpr):
    """W tiles [R, BK] times x tiles [BK] -> [R] in float32."""
    total = w[0].to(tl.float32) * x[0][None, :]
    for chunk in tl.static_range(1, CHUNKS):
        total += w[chunk].to(tl.float32) * x[chunk][None, :]
    return tl.sum(total, axis=1)
