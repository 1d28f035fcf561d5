import pytest
import torch
import torch.nn.functional as F

from model_core.kernels.swiglu import bytes_moved, flops, swiglu, swiglu_torch

GPU = torch.cuda.is_available()


@pytest.mark.parametrize("rows,inner", [(1, 64), (3, 192), (17, 100)] + [(129, 1536), (2048, 5632), (5, 11008)] * GPU)
@pytest.mark.parametrize("op", [swiglu, swiglu_torch])
def test_against_float64(device, dtype, close, op, rows, inner):
    x = torch.randn(rows, 2 * inner, device=device).mul_(3).to(dtype)
    gate, up = x.double().chunk(2, -1)
    expected = F.silu(gate) * up
    # exp errs by its argument's roundings; below the smallest normal number silu's own rounding is absolute
    close(op(x), expected, 4, expected.abs() * (1 + gate.abs()) + torch.finfo(dtype).tiny * (1 + up.abs()))


def test_large_values_stay_finite(device, dtype):
    x = torch.tensor([[60.0, -60.0, 0.0, 1.0, 1.0, 2.0]], device=device).to(dtype)
    expected = torch.tensor([[60.0, 0.0, 0.0]], device=device)
    assert torch.allclose(swiglu(x).float(), expected, atol=1e-6)


def test_formulas():
    assert bytes_moved(3, 8, 2) == 3 * 8 * 3 * 2
    assert flops(3, 8) > 0
