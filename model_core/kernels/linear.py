"""x @ weight.T (+ bias): cuBLAS on a GPU, or kernels/linear_fixed.py where rows must not depend on each other; on an x86 CPU
half-precision panels streamed by FBGEMM, float32 arithmetic.

Decoding reads every weight once per step, so bytes per second decide. Measured on 2 Zen 3 cores, all linears of SmolLM2-135M
(538 MB as float32), milliseconds a step, torch 2.11:

    rows                                        1     4     8    16    64   256
    F.linear float32 (MKL)                     47    94    98    89   185   590
    weight transposed, torch.mm                36   105   113
    F.linear bfloat16 (oneDNN)                 20    75   210
    "half": FBGEMM, 16-bit panels              15    22    37    37   125   531
    "split": FBGEMM, two panels per float32    32    41    69    78   247  1198

FBGEMM (Khudia et al. 2021, arXiv 2101.05615) keeps weights as float16 panels in the order its kernel reads them, widens in
registers and accumulates in float32. Its kernels of three to six rows add over K in one order, those of one or two rows in
others; no BLAS promises even that. `invariant` pads to rows of the first kind: a row's bits then depend on nothing else.

"half" holds 16-bit weights. bfloat16 values fit float16 exactly above 2**-17, so activations in float32 make it more exact
than bfloat16 arithmetic, not less. "split" holds float32 weights as high + low halves (Ootomo and Yokota 2022,
arXiv 2203.03341): 22 to 24 bits of each weight, the bytes of float32, FBGEMM's speed.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch
import torch.nn.functional as F

from model_core.kernels.linear_fixed import linear_fixed

Layout = Literal["plain", "half", "split"]

_HALF_BITS = 11  # significant bits of a float16
_PLAIN_ROWS = 32  # from here on MKL's float32 product is faster than twice the arithmetic of "split" (table above)


class Linear:
    """One weight [N, K] in the layout its device and dtype ask for. Call with x [M, K] -> [M, N].

    `dtype` is that of x and of the result. invariant: a row's result is the same bits whatever M. The price on the CPU is
    three rows' time for one (table above) and for "split" the float32 product of long chunks (half as fast, but its
    memory is saved); without packing a CPU cannot promise this, hence an assertion. wide: the result is float32, not
    rounded to `dtype`, where that costs nothing (an invariant product on a GPU).
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, layout: Layout | None = None,
                 invariant: bool = False, wide: bool = False) -> None:
        self.layout: Layout = layout_for(weight.dtype, weight.device) if layout is None else layout
        assert self.layout == "plain" or packing_works(), "FBGEMM's half-precision product is not available here"
        assert not invariant or self.layout != "plain" or weight.is_cuda, "row-invariant products need the packed layouts"
        self.invariant = invariant
        self.dtype = weight.dtype if self.layout == "plain" else torch.float32
        self.result = torch.float32 if wide else self.dtype
        self.out_features, self.in_features = weight.shape
        self.weight: torch.Tensor | None = None
        self.bias = None if bias is None else bias.to(self.dtype)
        self.nbytes = 0 if bias is None else bias.numel() * self.dtype.itemsize
        if self.layout == "plain":
            self._keep(weight)
        else:
            self._pack(weight)
            if self.layout == "split" and not invariant:
                self._keep(weight)

    @property
    def nbytes_read(self) -> int:
        """Bytes that a product of few rows reads: of the packed panels where there are any."""
        kept = 0 if self.weight is None or self.layout == "plain" else self.weight.numel() * self.weight.element_size()
        return self.nbytes - kept

    @property
    def accumulates(self) -> bool:
        """Whether `add_to` is the product's own last step here: cuBLAS adds in float32 before it rounds."""
        return self.weight is not None and self.weight.is_cuda and self.bias is None and not self.invariant

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        """residual [M, N] += x @ weight.T in place, rounded once. With a norm behind it o of Llama-2-7B takes 103 us for 1920
        rows, the product alone 90, product and add_rmsnorm 113 (H100)."""
        assert self.accumulates and self.weight is not None
        residual.addmm_(x, self.weight.t())

    def _keep(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.nbytes += weight.numel() * weight.element_size()

    def _pack(self, weight: torch.Tensor) -> None:
        wide = weight.float()
        exponent = _exponent(wide)
        if self.layout == "half":
            # Rounding to float16 errs by 2**-25 below 2**-14, nothing beside a largest weight in this range.
            self.scales = None if -4 <= exponent <= 15 else torch.tensor(2.0 ** (exponent - 14))
            panels = wide if self.scales is None else wide * 2.0 ** (14 - exponent)
        else:
            # The largest weight goes near float16's top, so that small ones keep their bits; powers of two are exact.
            high_scale = 2.0 ** (exponent - 14)
            self.scales = torch.tensor([[high_scale], [high_scale * 2.0**-_HALF_BITS]])
            wide = wide / high_scale
            high = wide.half().float()
            panels = torch.cat((high, (wide - high) * 2.0**_HALF_BITS), dim=1)
        self._panels = torch.ops.quantized.linear_prepack_fp16(panels, self.bias)
        self.nbytes += panels.numel() * 2

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight is not None and self.invariant:
            return linear_fixed(x, self.weight, self.bias, out_dtype=self.result)
        if self.weight is not None and (self.layout == "plain" or x.shape[0] >= _PLAIN_ROWS):
            return F.linear(x, self.weight, self.bias)
        if self.scales is not None:
            x = x * self.scales if self.layout == "half" else (x.unsqueeze(1) * self.scales).flatten(1)
        rows = x.shape[0]
        padding = _padding(rows) if self.invariant else 0
        return _multiply(F.pad(x, (0, 0, 0, padding)), self._panels)[:rows] if padding else _multiply(x, self._panels)


def _multiply(x: torch.Tensor, panels: torch.ScriptObject) -> torch.Tensor:
    return torch.ops.quantized.linear_dynamic_fp16.default(x, panels)


def _padding(rows: int) -> int:
    """Rows to add so that FBGEMM divides all of them into kernels of three to six rows."""
    return max(3 - rows, 0) if rows <= 6 else -rows % 6


def _exponent(weight: torch.Tensor) -> int:
    """e with 2**(e - 1) <= largest |weight| < 2**e; 0 for a weight of zeros."""
    largest = weight.abs().max().item()
    return math.frexp(largest)[1]


def layout_for(dtype: torch.dtype, device: torch.device) -> Layout:
    """The measured choice: packed on a CPU that has FBGEMM, else whatever F.linear does."""
    if device.type != "cpu" or not packing_works():
        return "plain"
    return "split" if dtype == torch.float32 else "half"


@functools.cache
def packing_works() -> bool:
    """Whether this build and CPU run FBGEMM's half-precision product (x86 with AVX2), found out by trying."""
    if not torch.backends.cpu.get_cpu_capability().startswith(("AVX2", "AVX512")):
        return False
    try:
        panels = torch.ops.quantized.linear_prepack_fp16(torch.eye(3), None)
        return torch.equal(_multiply(torch.ones(1, 3), panels), torch.ones(1, 3))
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


def bytes_moved(rows: int, out_features: int, in_features: int, weight_bytes: int, element_size: int) -> int:
    """x read, the result written, the weight (weight_bytes per element) read once."""
    return out_features * in_features * weight_bytes + rows * (in_features + out_features) * element_size


def flops(rows: int, out_features: int, in_features: int) -> int:
    """A product and a sum per weight and row ("split" executes twice that)."""
    return 2 * rows * out_features * in_features
