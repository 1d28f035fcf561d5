"""GGML blocks to numbers: bit for bit what the gguf package makes of them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from model_core.weights.dequantise import dequantise, dequantise_into

KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
         "IQ4_XS"]  # fmt: skip


def blocks(kind: str, rows: int, columns: int) -> np.ndarray:
    """Any bytes are a block; those whose scales are NaN or infinite are drawn again."""
    size, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    source = np.random.default_rng(sum(map(ord, kind)))
    while True:
        raw = source.integers(0, 256, (rows * columns // size, nbytes), dtype=np.uint8)
        finite = np.isfinite(gguf.quants.dequantize(raw, GGMLQuantizationType[kind]).astype(np.float32)).all(axis=1)
        if finite.mean() > 0.5:
            return np.resize(raw[finite], raw.shape).reshape(rows, -1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # scales that are no numbers, on their way to be drawn again
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_the_gguf_package(kind: str) -> None:
    raw = blocks(kind, 6, 512)
    expected = gguf.quants.dequantize(raw, GGMLQuantizationType[kind]).astype(np.float32)
    assert expected.shape == (6, 512) and np.unique(expected).size > 15
    assert np.array_equal(dequantise(torch.from_numpy(raw), kind).float().numpy(), expected)


@pytest.mark.parametrize("kind", ["BF16", "Q4_1", "Q4_K", "Q6_K"])
def test_a_large_tensor_is_filled_in_pieces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_core.weights.dequantise._PIECE", 1024)
    raw = blocks(kind, 7, 256)
    target = torch.full((7, 256), torch.nan)
    dequantise_into(target, raw, kind)
    assert torch.equal(target, dequantise(torch.from_numpy(raw), kind).float().view(7, 256))
