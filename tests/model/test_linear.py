"""Linear layers: accuracy of every layout against float64, bit-equality of rows, and the rule that chooses."""

from __future__ import annotations

import pytest
import torch

from model_core.kernels import linear
from model_core.kernels.linear import Linear

EPS = torch.finfo(torch.float32).eps
packed = pytest.mark.skipif(not linear.packing_works(), reason="FBGEMM's half-precision product needs x86 with AVX2")
SHAPES = [(1, 1), (7, 5), (37, 61), (96, 64), (576, 960), (200, 1536)]


def make(rows: int, outputs: int, inputs: int, spread: float = 0.05) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(outputs * 10007 + inputs)
    return (torch.randn(rows, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator) * spread)


def error(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | float = 0.0) -> float:
    """Largest error in units of eps * sum |x w|, the scale of rounding in a dot product."""
    wanted = x.double() @ weight.double().T + (bias.double() if isinstance(bias, torch.Tensor) else bias)
    scale = x.double().abs() @ weight.double().abs().T + 1e-300
    return ((found.double() - wanted).abs() / scale).max().item() / EPS


@packed
@pytest.mark.parametrize("outputs,inputs", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_packed_products_are_float32_products(dtype, rows, outputs, inputs):
    x, weight = make(rows, outputs, inputs)
    weight = weight.to(dtype)
    found = Linear(weight)(x)
    assert found.shape == (rows, outputs) and found.dtype == torch.float32
    assert error(found, x, weight) <= 24  # FBGEMM adds in sequence, split doubles the terms: up to 9 measured


@packed
@pytest.mark.parametrize("spread", [1e-12, 1e-5, 1.0, 3e4, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scale_of_the_weights_does_not_matter(dtype, spread):
    """Far below and above float16's range: a power of two moves the weights into it."""
    x, weight = make(5, 40, 96, spread)
    weight = weight.to(dtype)
    assert error(Linear(weight)(x), x, weight) <= 24


@packed
def test_zero_weight_and_bias():
    x, weight = make(4, 12, 20)
    bias = torch.linspace(-3, 3, 12)
    assert torch.equal(Linear(torch.zeros(12, 20), bias)(x), bias.expand(4, 12))
    assert error(Linear(weight.bfloat16(), bias.bfloat16())(x), x, weight.bfloat16(), bias.bfloat16()) <= 24
    assert error(Linear(weight, bias)(x), x, weight, bias) <= 24


@packed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_invariant_rows_are_the_same_bits_in_any_batch(dtype, threads):
    x, weight = make(130, 61, 96)
    multiply = Linear(weight.to(dtype), invariant=True)
    alone = torch.cat([multiply(row[None]) for row in x])
    torch.set_num_threads(threads)
    for rows in range(1, 131):
        assert torch.equal(multiply(x[:rows]), alone[:rows]), rows
        assert torch.equal(multiply(x[-rows:]), alone[-rows:]), rows
    torch.set_num_threads(1)


@packed
def test_memory_is_reported():
    weight = make(1, 64, 32)[1]
    assert Linear(weight.bfloat16()).nbytes == 64 * 32 * 2
    assert Linear(weight).nbytes == 64 * 32 * (4 + 4)
    assert Linear(weight, invariant=True).nbytes == 64 * 32 * 4
    assert Linear(weight, layout="plain").nbytes == 64 * 32 * 4


def test_plain_is_torch():
    x, weight = make(3, 64, 32)
    bias = torch.ones(64)
    multiply = Linear(weight.bfloat16(), bias.bfloat16(), layout="plain")
    wanted = torch.nn.functional.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    assert multiply.dtype == torch.bfloat16 and torch.equal(multiply(x.bfloat16()), wanted)


def test_rule(monkeypatch):
    monkeypatch.setattr(linear, "packing_works", lambda: True)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert linear.layout_for(torch.float32, cpu) == "split"
    assert linear.layout_for(torch.bfloat16, cpu) == linear.layout_for(torch.float16, cpu) == "half"
    assert linear.layout_for(torch.float16, cuda) == "plain"
    monkeypatch.setattr(linear, "packing_works", lambda: False)
    assert linear.layout_for(torch.bfloat16, cpu) == "plain"
    with pytest.raises(AssertionError, match="not available"):
        Linear(torch.ones(2, 2), layout="half")
    with pytest.raises(AssertionError, match="row-invariant"):
        Linear(torch.ones(2, 2), invariant=True)
