"""What a decode step reads and advances on the device: tensors by slot, and the rows of a batch that point to slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class DecodeState:
    """Per-slot state. Slot `max_seqs` is the dump slot of padding rows: token 0 at position 0 of page 0, for ever.

    Sampling follows philox.py: the noise of a token depends on (seed, position) alone.
    """

    last_token: torch.Tensor  # int64 [max_seqs + 1]: sampled, not yet computed
    position: torch.Tensor  # int32 [max_seqs + 1]: of that token, = tokens in the cache before it
    block_tables: torch.Tensor  # int32 [max_seqs + 1, max_pages]
    temperature: torch.Tensor  # float32 [max_seqs + 1]; 0 is greedy
    seed: torch.Tensor  # int64 [max_seqs + 1]

    @property
    def dump(self) -> int:
        return self.position.shape[0] - 1

    @classmethod
    def empty(cls, max_seqs: int, max_pages: int, device: torch.device | str) -> DecodeState:
        slots = max_seqs + 1
        return cls(
            last_token=torch.zeros(slots, dtype=torch.int64, device=device),
            position=torch.zeros(slots, dtype=torch.int32, device=device),
            block_tables=torch.zeros((slots, max_pages), dtype=torch.int32, device=device),
            temperature=torch.zeros(slots, dtype=torch.float32, device=device),
            seed=torch.zeros(slots, dtype=torch.int64, device=device),
        )
