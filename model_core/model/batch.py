"""What one engine step computes: tokens of many sequences laid end to end (variable-length, "varlen")."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Batch:
    """Inputs of one forward pass over T tokens of S sequences, decodes first.

    Sequence s owns tokens query_start[s] : query_start[s + 1]; its first `context_len[s]` positions, these tokens
    included, are what it attends to (causally). Pages of position p of sequence s: block_tables[s, p // page_size].
    All tensors are on the model's device; the plain ints are known on the host, so no op needs to wait for the device.
    """

    token_ids: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T]
    slot_mapping: torch.Tensor  # int64 [T]: page * page_size + offset where the token's K and V are written
    query_start: torch.Tensor  # int32 [S + 1]
    context_len: torch.Tensor  # int32 [S]
    block_tables: torch.Tensor  # int32 [S, max_pages]; entries past a sequence's last page are 0 and never read
    logit_rows: torch.Tensor  # int64 [R]: the rows of T whose logits are wanted
    query_lens: list[int]  # [S] on the host
    context_lens: list[int]  # [S] on the host
    num_decodes: int  # the first num_decodes sequences have exactly one token
    blocks: torch.Tensor | None = None  # int32 [n, 2]: see `prefill_blocks`; made by the first op that asks for it

    def prefill_blocks(self, tokens: int) -> torch.Tensor:
        """(sequence, block) of every block of `tokens` query tokens after the decodes; sequence -1 is none.

        Later blocks first: they see the most keys, so they should not start last.
        """
        if self.blocks is None:
            found = blocks_of(self.query_lens, tokens, self.num_decodes)
            self.blocks = torch.tensor(found, dtype=torch.int32).to(self.token_ids.device, non_blocking=True)
        return self.blocks

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_seqs(self) -> int:
        return self.context_len.shape[0]

    @property
    def max_context_len(self) -> int:
        return max(self.context_lens)


def blocks_of(query_lens: list[int], tokens: int, first: int = 0) -> list[tuple[int, int]]:
    """(sequence, block) of the blocks of `tokens` tokens that sequences first.. have, late blocks first."""
    blocks = [(seq, block) for seq in range(first, len(query_lens)) for block in range(-(-query_lens[seq] // tokens))]
    return sorted(blocks, key=lambda item: -item[1])
