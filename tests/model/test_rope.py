"""The rotary table, bit for bit what transformers computes."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from model_core.model.config import ModelConfig
from model_core.model.rope import cos_sin_table

_SCALINGS = {
    "none": dict(rope_type="default", rope_theta=10000.0),
    "smollm2": dict(rope_type="default", rope_theta=100000.0),
    "linear": dict(rope_type="linear", rope_theta=10000.0, factor=2.5),
    "llama3.1": dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                     original_max_position_embeddings=8192),
    "llama3.2": dict(rope_type="llama3", rope_theta=500000.0, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
                     original_max_position_embeddings=8192),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(_SCALINGS))
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
def test_equals_transformers(kind, head_dim):
    theirs_config = LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, num_key_value_heads=2, head_dim=head_dim,
                                vocab_size=32, num_hidden_layers=1, intermediate_size=8, max_position_embeddings=131072,
                                rope_parameters=_SCALINGS[kind], architectures=["LlamaForCausalLM"])  # fmt: skip
    ours = cos_sin_table(ModelConfig.from_hf(theirs_config.to_dict()), 3000, "cpu")
    assert ours.shape == (3000, head_dim) and ours.dtype == torch.float32
    cos, sin = LlamaRotaryEmbedding(theirs_config)(torch.zeros(1), torch.arange(3000)[None])
    half = head_dim // 2
    assert torch.equal(ours[:, :half], cos[0, :, :half]) and torch.equal(ours[:, half:], sin[0, :, half:])
