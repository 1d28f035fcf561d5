"""What a decode step reads and advances on the device: tensors by slot, and the rows of a batch that point to slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MAX_LOGIT_BIAS = 512  # entries of one request; a power of two, like the next
MAX_STOPS = 64  # stop ids that min_tokens holds back in a graph

# The rules of a slot are one row of int32, so that one copy brings them to the device. Floats are there by their bits.
BIAS, PENALTIES, STOPS, TOP_K, TOP_P, MIN_P = 1, 2, 4, 8, 16, 32  # what applies: bits of word 0
HELD = 64  # another one: the slot's token is chosen under a mask, see HeldRows
BIAS_COUNT, STOP_COUNT, WANTED_K = 1, 2, 3
FIRST_STOP = 4  # the first position where a stop id may stand
WANTED_P, LOG_MIN_P, REPETITION, PRESENCE, FREQUENCY = 5, 6, 7, 8, 9  # floats
STOP_IDS = 16
BIAS_IDS = STOP_IDS + MAX_STOPS
BIAS_VALUES = BIAS_IDS + MAX_LOGIT_BIAS  # floats
RULES = BIAS_VALUES + MAX_LOGIT_BIAS  # words of a row
RING = 8  # more than the steps in flight, and so than a slot's tokens that the host has not read


@dataclass(frozen=True)
class HeldRows:
    """What rows of slots with HELD need besides: a graph computes their logits and leaves them alone, and another launch of
    restrict.py and sample.py, over those rows only, chooses their tokens once their masks are there."""

    places: torch.Tensor  # int64 [M]: the logits of row i are row places[i] of the graph's
    masks: torch.Tensor  # int32 [M, ceil(vocab / 32)]: a bit per token that may be chosen, lowest bit of the first word first


@dataclass
class DecodeState:
    """Per-slot state. Slot `max_seqs` is the dump slot of padding rows: token 0 at position 0 of page 0, for ever.

    `chosen` is how tokens reach the host: the one of position p is in column p % RING of its slot, -1 if the logits were not
    finite, -2 if a mask allowed nothing. Kernels write it to pinned host memory, where a copy behind the graph took 10 us a
    step. Sampling follows philox.py: the noise of a token depends on (seed, position) alone. `counts` is 2 * (times generated)
    + (1 if in the prompt), kept up to date for slots with penalties.
    """

    chosen: torch.Tensor  # int64 [max_seqs + 1, RING], on the host
    last_token: torch.Tensor  # int64 [max_seqs + 1]: sampled, not yet computed
    position: torch.Tensor  # int32 [max_seqs + 1]: of that token, = tokens in the cache before it
    block_tables: torch.Tensor  # int32 [max_seqs + 1, max_pages]
    temperature: torch.Tensor  # float32 [max_seqs + 1]; 0 is greedy
    seed: torch.Tensor  # int64 [max_seqs + 1]
    rules: torch.Tensor  # int32 [max_seqs + 1, RULES]: what the slot's request asks for besides; all 0 is nothing
    counts: torch.Tensor  # int32 [max_seqs, vocab], the sampler's; [1, 1] where no slot has penalties

    @property
    def dump(self) -> int:
        return self.position.shape[0] - 1

    @classmethod
    def empty(cls, max_seqs: int, max_pages: int, device: torch.device | str,
              counts: torch.Tensor | None = None) -> DecodeState:  # fmt: skip
        slots = max_seqs + 1
        return cls(
            chosen=torch.zeros((slots, RING), dtype=torch.int64, pin_memory=torch.device(device).type == "cuda"),
            last_token=torch.zeros(slots, dtype=torch.int64, device=device),
            position=torch.zeros(slots, dtype=torch.int32, device=device),
            block_tables=torch.zeros((slots, max_pages), dtype=torch.int32, device=device),
            temperature=torch.zeros(slots, dtype=torch.float32, device=device),
            seed=torch.zeros(slots, dtype=torch.int64, device=device),
            rules=torch.zeros((slots, RULES), dtype=torch.int32, device=device),
            counts=torch.zeros((1, 1), dtype=torch.int32, device=device) if counts is None else counts,
        )
