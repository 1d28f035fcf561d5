"""The kernel tests run in Triton's interpreter on a CPU (small shapes) and compiled on a GPU (all shapes, bfloat16)."""

from __future__ import annotations

import pytest
import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`dtype` is bfloat16, float16 and float32 on a GPU; the interpreter has no bfloat16."""
    if "dtype" in metafunc.fixturenames:
        kinds = [torch.float32, torch.float16] + [torch.bfloat16] * GPU
        metafunc.parametrize("dtype", kinds, ids=lambda kind: str(kind).removeprefix("torch."))


@pytest.fixture
def device() -> str:
    torch.manual_seed(0)
    return DEVICE


@pytest.fixture
def close():
    """close(actual, exact, multiple): |actual - exact| <= multiple * eps(actual.dtype) * scale, elementwise.

    scale is the largest |exact| of the last dimension, or what `scale` says: errors of sums are relative to their terms.
    """

    def check(actual: torch.Tensor, exact: torch.Tensor, multiple: float, scale: torch.Tensor | float | None = None) -> None:
        assert actual.shape == exact.shape
        wide, exact = actual.double(), exact.double()
        assert torch.isfinite(wide).all()
        scale = exact.abs().amax(-1, keepdim=True) if scale is None else scale
        bound = multiple * torch.finfo(actual.dtype).eps * scale
        worst = ((wide - exact).abs() / bound).max().item()
        assert worst <= 1, f"{worst * multiple:.1f} roundings of {actual.dtype}, {multiple} are allowed"

    return check
