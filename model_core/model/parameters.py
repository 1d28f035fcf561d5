"""Where a model's weights live: one dataclass per layer, rows fused as the forward pass reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model_core.model.config import ModelConfig


@dataclass
class LayerParameters:
    """One decoder layer. Linear weights are [out_features, in_features], as torch.nn.Linear keeps them."""

    attn_norm: torch.Tensor  # [hidden]
    qkv: torch.Tensor  # [q_size + 2 * kv_size, hidden]: all query heads, then keys, then values
    o: torch.Tensor  # [hidden, q_size]
    mlp_norm: torch.Tensor  # [hidden]
    gate_up: torch.Tensor  # [2 * intermediate, hidden]: all gate rows, then all up rows
    down: torch.Tensor  # [hidden, intermediate]
    qkv_bias: torch.Tensor | None = None  # [q_size + 2 * kv_size], Qwen2
    q_norm: torch.Tensor | None = None  # [head_dim], Qwen3
    k_norm: torch.Tensor | None = None  # [head_dim], Qwen3


@dataclass
class Parameters:
    """A whole model. `head` is `embed` itself (the same storage) when the checkpoint ties them."""

    embed: torch.Tensor  # [vocab, hidden]
    layers: list[LayerParameters]
    final_norm: torch.Tensor  # [hidden]
    head: torch.Tensor  # [vocab, hidden]

    @classmethod
    def empty(cls, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str) -> Parameters:
        """Uninitialised storage of the right shapes; the loader fills it, tests fill it with seeded noise."""

        def new(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        hidden, qkv_rows = config.hidden_size, config.q_size + 2 * config.kv_size
        layers = [
            LayerParameters(
                attn_norm=new(hidden),
                qkv=new(qkv_rows, hidden),
                o=new(hidden, config.q_size),
                mlp_norm=new(hidden),
                gate_up=new(2 * config.intermediate_size, hidden),
                down=new(hidden, config.intermediate_size),
                qkv_bias=new(qkv_rows) if config.qkv_bias else None,
                q_norm=new(config.head_dim) if config.qk_norm else None,
                k_norm=new(config.head_dim) if config.qk_norm else None,
            )
            for _ in range(config.num_layers)
        ]
        embed = new(config.vocab_size, hidden)
        head = embed if config.tie_embeddings else new(config.vocab_size, hidden)
        return cls(embed=embed, layers=layers, final_norm=new(hidden), head=head)

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor once (a tied head is not repeated)."""
        found = [self.embed, self.final_norm]
        if self.head is not self.embed:
            found.append(self.head)
        for layer in self.layers:
            found += [value for value in vars(layer).values() if value is not None]
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all weights in memory."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())
