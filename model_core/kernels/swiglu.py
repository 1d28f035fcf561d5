"""SwiGLU's elementwise half (Shazeer 2020, arXiv 2002.05202): silu(gate) * up over the fused projection's output."""

import torch
import torch.nn.functional as F

from model_core.kernels.runtime import cdiv, jit, tl

_BLOCK = 512


@jit(do_not_specialize_on_alignment=["x_ptr", "y_ptr"])
def _swiglu_kernel(x_ptr, y_ptr, x_row, y_row, I: tl.constexpr, BLOCK: tl.constexpr):  # noqa: E741
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < I
    gate = tl.load(x_ptr + row * x_row + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_row + I + column, mask=mask, other=0.0).to(tl.float32)
    # silu is rounded to the dtype before the product, as separate torch (and Hugging Face) operations would do.
    activated = (gate / (1.0 + tl.exp(-gate))).to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + row * y_row + column, (activated * up).to(y_ptr.dtype.element_ty), mask=mask)


def swiglu(gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Triton. gate_up [T, 2 * I] (all gates, then all ups; any row stride) -> [T, I], same dtype, contiguous."""
    tokens, width = gate_up.shape
    intermediate = width // 2
    assert width == 2 * intermediate and gate_up.stride(1) == 1
    y = torch.empty((tokens, intermediate), dtype=gate_up.dtype, device=gate_up.device) if out is None else out
    if tokens:
        grid = (tokens, cdiv(intermediate, _BLOCK))
        _swiglu_kernel[grid](gate_up, y, gate_up.stride(0), y.stride(0), I=intermediate, BLOCK=_BLOCK, num_warps=4)
    return y


def swiglu_torch(gate_up: torch.Tensor, *, by_row: bool = False) -> torch.Tensor:
    """Reference of `swiglu`. by_row: one silu per row. On a CPU torch's vectors and the scalars after them round exp
    differently, and where threads divide a tensor depends on its number of rows."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (torch.stack([F.silu(row) for row in gate]) if by_row else F.silu(gate)).mul_(up)


def bytes_moved(tokens: int, intermediate: int, element_size: int) -> int:
    """Two inputs read and one output written per element."""
    return 3 * tokens * intermediate * element_size


def flops(tokens: int, intermediate: int) -> int:
    """Negate, exp, add, divide, multiply per output."""
    return 5 * tokens * intermediate
