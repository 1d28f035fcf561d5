from __future__ import annotations

import torch

from model_core.model.config import ModelConfig
from model_core.model.kv import KVCache

_CONFIG = ModelConfig(family="llama", num_layers=3, hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2,
                      head_dim=8, vocab_size=50, context_length=64)  # fmt: skip


def test_shapes_and_bytes():
    kv = KVCache.empty(_CONFIG, 10, 16, torch.bfloat16, "cpu")
    assert len(kv.k) == len(kv.v) == 3
    for index in range(3):
        k, v = kv.layer(index)
        assert k.shape == v.shape == (10, 16, 2, 8) and k.is_contiguous() and not k.any() and not v.any()
    assert kv.nbytes == 10 * 16 * _CONFIG.kv_bytes_per_token(2) == 10 * 16 * 2 * 3 * 16 * 2


def test_cuda_pages_are_head_major(monkeypatch):
    """The logical shape stays; a head's tile of a page is contiguous. (Allocation redirected: no GPU is needed.)"""
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda shape, dtype, device: zeros(shape, dtype=dtype))
    k, _ = KVCache.empty(_CONFIG, 10, 16, torch.float16, "cuda").layer(0)
    assert k.shape == (10, 16, 2, 8) and k[4, :, 1].is_contiguous() and not k.is_contiguous()


def test_poison():
    kv = KVCache.empty(_CONFIG, 2, 8, torch.float32, "cpu")
    kv.poison(1e30)
    assert all(bool((tensor == 1e30).all()) for tensor in (*kv.k, *kv.v))
