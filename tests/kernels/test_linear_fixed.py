import pytest
import torch

from model_core.kernels.linear_fixed import (
    _MANY,
    BLOCK_K,
    FixedTiles,
    bytes_moved,
    fixed_tiles,
    flops,
    linear_fixed,
    linear_fixed_torch,
)

GPU = torch.cuda.is_available()
SHAPES = [(1, 16, 64), (3, 70, 128), (65, 33, 100)] + [(7, 2560, 2048), (300, 2048, 5632), (2048, 32000, 2048)] * GPU


def make(rows, outputs, inputs, dtype, device):
    x, weight = torch.randn(rows, inputs, device=device), torch.randn(outputs, inputs, device=device) * 0.05
    return x.to(dtype), weight.to(dtype), torch.randn(outputs, device=device).to(dtype)


@pytest.mark.parametrize("rows,outputs,inputs", SHAPES)
@pytest.mark.parametrize("multiply", [linear_fixed, linear_fixed_torch])
def test_against_float64(device, dtype, close, multiply, rows, outputs, inputs):
    x, weight, bias = make(rows, outputs, inputs, dtype, device)
    terms = x.double().abs() @ weight.double().abs().T
    for offset in (None, bias):
        exact = x.double() @ weight.double().T + (0 if offset is None else offset.double())
        wide = multiply(x, weight, offset, out_dtype=torch.float32)
        assert wide.dtype == torch.float32
        close(wide, exact, 24, terms + bias.double().abs())  # float32 sums, in any order
        assert torch.equal(multiply(x, weight, offset), wide.to(dtype))  # rounded once


@pytest.mark.parametrize("tiles", _MANY if GPU else [_MANY[-1], FixedTiles(128, 32, 4, 2)], ids=str)
def test_rows_are_the_same_bits_in_any_batch_and_tile(device, dtype, tiles):
    """In the interpreter this says that masks and indices are right: there a product is the CPU's BLAS, which may add in an
    order that depends on the tile. That tensor cores add alike is asked of a GPU."""
    if GPU and dtype == torch.float32:
        pytest.skip("float32 has one tile only")
    x, weight, bias = make(70, 48, 160, dtype, device)
    whole = linear_fixed(x, weight, bias, out_dtype=torch.float32)
    for rows in (slice(0, 1), slice(69, 70), slice(3, 68)):
        tolerance = {} if GPU else dict(rtol=1e-5, atol=1e-5)
        found = linear_fixed(x[rows], weight, bias, out_dtype=torch.float32, tiles=tiles)
        torch.testing.assert_close(found, whole[rows], **({"rtol": 0, "atol": 0} | tolerance))


def test_no_rows(device):
    assert linear_fixed(torch.empty(0, 64, device=device), torch.empty(32, 64, device=device)).shape == (0, 32)


def test_tiles():
    """x is always 64 rows of an instruction, and shared memory is what the device has."""
    for dtype in (torch.bfloat16, torch.float16):
        for outputs in (64, 2048, 2560, 11264, 32000, 128256):
            for rows in (1, 16, 64, 65, 256, 2048, 16384):
                for shared in (99 << 10, 227 << 10):
                    tiles = fixed_tiles(rows, outputs, dtype, shared)
                    assert tiles.rows in (64, 128) and tiles.warps * 16 == tiles.rows
                    assert tiles.stages * (tiles.rows + tiles.columns) * BLOCK_K * 2 <= shared
    assert fixed_tiles(1, 2048, torch.bfloat16).columns == 16  # 128 programs
    assert fixed_tiles(64, 32000, torch.bfloat16).columns == 128
    assert fixed_tiles(2048, 2048, torch.bfloat16)[:2] == (128, 256)
    assert fixed_tiles(1, 32000, torch.float32) == fixed_tiles(2048, 64, torch.float32)


def test_cost():
    assert bytes_moved(2, 32, 64, 2, 4) == (2 * 64 + 32 * 64) * 2 + 2 * 32 * 4
    assert flops(2, 32, 64) == 2 * 2 * 32 * 64
