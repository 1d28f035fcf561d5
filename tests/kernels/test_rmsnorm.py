import pytest
import torch

from model_core.kernels.rmsnorm import add_rmsnorm, add_rmsnorm_torch, bytes_moved, flops, rmsnorm, rmsnorm_torch

GPU = torch.cuda.is_available()

SHAPES = [(1, 64), (3, 192), (17, 576), (5, 760)] + [(129, 2048), (4096, 4096), (7, 8192), (33, 11008)] * GPU
EPS = 1e-5


def exact(x, weight):
    wide = x.double()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight.double()


@pytest.mark.parametrize("rows,hidden", SHAPES)
@pytest.mark.parametrize("norm", [rmsnorm, rmsnorm_torch])
def test_plain(device, dtype, close, norm, rows, hidden):
    x = torch.randn(rows, hidden, device=device).mul_(3).to(dtype)
    weight = torch.rand(hidden, device=device).add_(0.5).to(dtype)
    # three roundings: the quotient's, the product's, and in 16 bits the input's square root of the scale
    close(norm(x, weight, EPS), exact(x, weight), 4, exact(x, weight).abs() + torch.finfo(dtype).tiny + 1e-6)


@pytest.mark.parametrize("rows,hidden", SHAPES)
@pytest.mark.parametrize("norm", [add_rmsnorm, add_rmsnorm_torch])
def test_fused_with_the_residual(device, dtype, close, norm, rows, hidden):
    x, residual = (torch.randn(rows, hidden, device=device).to(dtype) for _ in range(2))
    weight = torch.rand(hidden, device=device).add_(0.5).to(dtype)
    summed = (x.float() + residual.float()).to(dtype)
    y = norm(x, residual, weight, EPS)
    assert torch.equal(residual, summed)
    close(y, exact(summed, weight), 4, exact(summed, weight).abs() + torch.finfo(dtype).tiny + 1e-6)


def test_kernel_and_reference_round_alike(device, dtype):
    x = torch.randn(9, 576, device=device).to(dtype)
    weight = torch.rand(576, device=device).to(dtype)
    different = (rmsnorm(x, weight, EPS) != rmsnorm_torch(x, weight, EPS)).float().mean().item()
    assert different < (0.5 if dtype == torch.float32 else 0.02)  # only where the sum of squares differs in its last bit


@pytest.mark.parametrize("heads,dim", [(3, 64), (5, 80)])
def test_heads_of_a_strided_view(device, dtype, close, heads, dim):
    fused = torch.randn(7, heads + 4, dim, device=device).to(dtype)
    view = fused[:, 2 : 2 + heads]
    weight = torch.rand(dim, device=device).add_(0.5).to(dtype)
    close(rmsnorm(view, weight, EPS), exact(view, weight), 4, exact(view, weight).abs() + 1e-6)


def test_rows_do_not_influence_each_other(device, dtype):
    x = torch.randn(33, 576, device=device).to(dtype)
    weight = torch.ones(576, device=device, dtype=dtype)
    whole = rmsnorm(x, weight, EPS)
    assert torch.equal(whole[5:6], rmsnorm(x[5:6].contiguous(), weight, EPS))


def test_other_layouts_are_refused(device):
    with pytest.raises(ValueError, match="contiguous"):
        rmsnorm(torch.zeros(4, 8, device=device).T, torch.ones(4, device=device), EPS)


def test_formulas():
    assert bytes_moved(10, 64, 2) == (2 * 10 * 64 + 64) * 2
    assert bytes_moved(10, 64, 2, add=True) == (4 * 10 * 64 + 64) * 2
    assert flops(10, 64) == 4 * 640
