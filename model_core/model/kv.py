"""The paged KV cache's storage. Who owns which page is model_core/cache's business."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model_core.model.config import ModelConfig


@dataclass
class KVCache:
    """Keys and values per layer, each logically [num_pages, page_size, kv_heads, head_dim].

    Physically [num_pages, kv_heads, page_size, head_dim] on CUDA (one head's keys of a page are one contiguous tile for the
    attention kernels), contiguous in logical order on the CPU (pages that are neighbours form one long run of tokens).
    """

    k: list[torch.Tensor]
    v: list[torch.Tensor]

    @classmethod
    def empty(cls, config: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype,
              device: torch.device | str) -> KVCache:
        """Zeroed storage: the torch twin may multiply what lies past a sequence's end by zero, so it must be finite."""
        head_major = torch.device(device).type == "cuda"
        inner = (config.num_kv_heads, page_size) if head_major else (page_size, config.num_kv_heads)

        def new() -> torch.Tensor:
            pages = torch.zeros((num_pages, *inner, config.head_dim), dtype=dtype, device=device)
            return pages.transpose(1, 2) if head_major else pages

        return cls(k=[new() for _ in range(config.num_layers)], v=[new() for _ in range(config.num_layers)])

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.k[index], self.v[index]

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.k, *self.v))

    def poison(self, value: float) -> None:
        """Fill every slot (tests: nothing but what was written may be read)."""
        for tensor in (*self.k, *self.v):
            tensor.fill_(value)
