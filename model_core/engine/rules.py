"""What a request asks of its logits, as the row of numbers that kernels/decode/restrict.py follows."""

from __future__ import annotations

import numpy as np
import torch

from model_core.engine.request import SamplingParams
from model_core.engine.sampler import count_tokens, uses_penalties
from model_core.engine.sequence import Sequence
from model_core.kernels.decode import state as at
from model_core.kernels.decode.state import DecodeState


def rules_of(params: SamplingParams, stop_ids: frozenset[int], num_prompt: int, vocab_size: int, *,
             held: bool = False) -> np.ndarray | None:  # fmt: skip
    """int32 [RULES], or None if greedy choice or temperature and seed are all that is asked for. held: there is a grammar."""
    row = np.zeros(at.RULES, dtype=np.int32)
    row[0] = at.HELD * held
    numbers = row.view(np.float32)
    if params.logit_bias:
        size, row[0] = len(params.logit_bias), row[0] | at.BIAS
        row[at.BIAS_COUNT] = size
        row[at.BIAS_IDS :][:size] = list(params.logit_bias)
        numbers[at.BIAS_VALUES :][:size] = list(params.logit_bias.values())
    if uses_penalties(params):
        row[0] |= at.PENALTIES
        numbers[at.REPETITION] = params.repetition_penalty
        numbers[at.PRESENCE], numbers[at.FREQUENCY] = params.presence_penalty, params.frequency_penalty
    if params.min_tokens and stop_ids:
        row[0] |= at.STOPS
        row[at.FIRST_STOP], row[at.STOP_COUNT] = num_prompt + params.min_tokens, len(stop_ids)
        row[at.STOP_IDS :][: len(stop_ids)] = sorted(stop_ids)
    if params.temperature:
        if 0 < params.top_k < vocab_size:
            row[0] |= at.TOP_K
            row[at.WANTED_K] = params.top_k
        if params.top_p < 1:
            row[0] |= at.TOP_P
            numbers[at.WANTED_P] = params.top_p
        if params.min_p > 0:
            row[0] |= at.MIN_P
            numbers[at.LOG_MIN_P] = torch.tensor(params.min_p).log()
    return row if row[0] else None


class SlotRules:
    """The host's side of DecodeState.rules and .counts. `ruled`: slots whose row on the device is not all zeros; `edited`: of
    them, those for which restrict.py has something to do in a graph."""

    def __init__(self, state: DecodeState, vocab_size: int) -> None:
        self.state, self.vocab_size = state, vocab_size
        self.ruled: set[int] = set()
        self.edited: set[int] = set()
        self._pin = state.rules.is_cuda

    def assign(self, seq: Sequence) -> bool:
        """Fill the slot of a sequence that starts or resumes; a plain one costs nothing. False if the graphs cannot do what it
        asks for: it must then be sampled by engine/sampler.py, and is left alone here."""
        slot, params = seq.slot, seq.request.params
        assert slot is not None
        possible = params.logprobs is None and not (params.min_tokens and len(seq.stop_ids) > at.MAX_STOPS)
        held = seq.matcher is not None
        row = rules_of(params, seq.stop_ids, seq.num_prompt, self.vocab_size, held=held) if possible else None
        if row is not None and uses_penalties(params):
            self._send(count_tokens(seq.tokens, seq.num_prompt, self.vocab_size), self.state.counts[slot])
        self.edited.discard(slot)
        if row is not None:
            self._send(row, self.state.rules[slot])
            self.ruled.add(slot)
            if not held:
                self.edited.add(slot)
        elif slot in self.ruled:
            self.state.rules[slot].zero_()
            self.ruled.remove(slot)
        return possible

    def _send(self, row: np.ndarray, to: torch.Tensor) -> None:
        host = torch.from_numpy(row)
        to.copy_(host.pin_memory() if self._pin else host, non_blocking=True)
