"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467), alone and fused with the residual addition before it.

y = weight * round(x / sqrt(mean(x^2) + eps)): the mean and the division in float32, the quotient rounded to x's dtype
before the weight multiplies it, as Hugging Face's LlamaRMSNorm does, so that bfloat16 logits agree with it.
"""

import torch
import torch.nn.functional as F

from model_core.kernels.runtime import cdiv, jit, next_power_of_2, row_layout, tl

# A tile holds at least this many elements: short rows (per-head norms of 64..128) share a program.
_TILE = 2048


@jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["x_ptr", "residual_ptr", "y_ptr"])
def _rmsnorm_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr,
    rows, x_outer, x_inner, residual_outer, residual_inner, y_outer, y_inner, eps,
    INNER: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < H)
    outer, inner = row // INNER, row % INNER
    x = tl.load(x_ptr + outer * x_outer + inner * x_inner + column, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        at = residual_ptr + outer * residual_outer + inner * residual_inner + column
        summed = (x + tl.load(at, mask=mask, other=0.0).to(tl.float32)).to(residual_ptr.dtype.element_ty)
        tl.store(at, summed, mask=mask)
        x = summed.to(tl.float32)  # the stored, rounded sum: what a separate norm would have read
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / H + eps)[:, None]
    normed = (x * scale).to(y_ptr.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < H, other=0.0).to(tl.float32)
    # The product of two 16-bit floats is exact in float32, so one rounding here equals a 16-bit multiplication.
    y = (normed * weight).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + outer * y_outer + inner * y_inner + column, y, mask=mask)


def _launch(x, residual, weight, eps, out):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    rows, inner, x_outer, x_inner = row_layout(x)
    y_rows = row_layout(y)
    residual_rows = row_layout(x if residual is None else residual)
    assert y_rows[:2] == residual_rows[:2] == (rows, inner) and weight.shape == x.shape[-1:] and weight.is_contiguous()
    if rows == 0:
        return y
    block = next_power_of_2(x.shape[-1])
    per_program = max(1, _TILE // block)
    _rmsnorm_kernel[(cdiv(rows, per_program),)](
        x, x if residual is None else residual, weight, y,
        rows, x_outer, x_inner, residual_rows[2], residual_rows[3], y_rows[2], y_rows[3], eps,
        INNER=inner, H=x.shape[-1], BLOCK=block, ROWS=per_program, ADD=residual is not None,
        num_warps=2 if block <= 2048 else 4 if block <= 8192 else 8 if block <= 16384 else 16,
    )
    return y


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """Triton. x [..., H] float32/bfloat16/float16, weight [H]; any layout `row_layout` takes. Returns x's shape, contiguous."""
    return _launch(x, None, weight, eps, out)


def add_rmsnorm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Triton. residual += x in place (rounded to its dtype), returns rmsnorm(residual); shapes as in `rmsnorm`."""
    return _launch(x, residual, weight, eps, out)


def rmsnorm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Reference. The same roundings as the kernel; float32 needs none, so torch's fused op does it."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    return wide.to(x.dtype).mul_(weight)


def add_rmsnorm_torch(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Reference of `add_rmsnorm`; residual changes in place."""
    return rmsnorm_torch(residual.add_(x), weight, eps)


def bytes_moved(rows: int, hidden: int, element_size: int, *, add: bool = False) -> int:
    """Bytes of one call: x read, y written, with `add` the residual read and written, the weight once."""
    return (rows * hidden * (4 if add else 2) + hidden) * element_size


def flops(rows: int, hidden: int, *, add: bool = False) -> int:
    """Square, sum, scale, weight (and the addition) per element."""
    return rows * hidden * (5 if add else 4)
