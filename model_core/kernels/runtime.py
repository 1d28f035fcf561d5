"""Whether Triton can run here, and the names kernels are written with: `jit`, `tl`, `cdiv`, `next_power_of_2`.

Importing triton costs 0.45 s (2-core CPU box), so a process without a GPU does not: there the torch references run and
the kernels stay plain, uncalled functions. TRITON_INTERPRET=1, set before this import, runs them on CPU tensors
(the interpreter has no bfloat16: it keeps raw bits and truncates).
"""

import importlib
import os
import sys
import types
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

triton: Any = None
if INTERPRETED or "triton" in sys.modules or torch.cuda.is_available():
    try:
        import triton  # type: ignore[no-redef]
    except ImportError:  # no wheel for this platform: the torch references serve
        triton = None



def _no_jit(function: Any = None, **_: Any) -> Any:
    return function if function is not None else lambda wrapped: wrapped


jit: Any = _no_jit
gluon_jit: Any = _no_jit  # Gluon: Triton with explicit layouts; the interpreter does not know it
tl: Any = types.SimpleNamespace(constexpr=int)
gl: Any = types.SimpleNamespace(constexpr=int)
if triton is not None:
    tl, jit = importlib.import_module("triton.language"), triton.jit
    if not INTERPRETED:
        gluon = importlib.import_module("triton.experimental.gluon")
        gl, gluon_jit = importlib.import_module("triton.experimental.gluon.language"), gluon.jit


def cdiv(a: int, b: int) -> int:
    """ceil(a / b) for positive ints."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two >= n (tile sides must be powers of two)."""
    return 1 << (n - 1).bit_length()


def why_unusable(device: torch.device) -> str | None:
    """None when Triton kernels run on tensors of `device`, else the reason in words."""
    if device.type == "cuda":
        return "triton is not installed" if triton is None else None
    return None if triton is not None and INTERPRETED else "the device is a CPU"


def row_layout(x: torch.Tensor) -> tuple[int, int, int, int]:
    """A tensor [..., H] as rows: (rows, inner, outer_stride, inner_stride), in elements.

    Row r starts at (r // inner) * outer_stride + (r % inner) * inner_stride. Covers contiguous tensors, [T, H] with any
    row stride and [T, heads, H] views of a fused projection. Raises ValueError for any other layout.
    """
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        raise ValueError(f"the last dimension must be contiguous, strides are {x.stride()}")
    if x.dim() == 3:
        return x.shape[0] * x.shape[1], x.shape[1], x.stride(0), x.stride(1)
    flat = x.view(-1, x.shape[-1])  # raises where the leading dimensions do not collapse
    return flat.shape[0], 1, flat.stride(0), 0
