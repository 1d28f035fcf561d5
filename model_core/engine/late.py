"""Rows that a captured step leaves to others: those under a grammar, whose masks depend on tokens that may be in flight, and
those that ask for log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from model_core.engine.flight import InFlight, Part
from model_core.engine.masks import RowMasks
from model_core.engine.packed import Packed
from model_core.engine.plan import Scheduled
from model_core.engine.rules import SlotRules
from model_core.engine.runner import forbidden_in, sample_every_way, sampled_together
from model_core.engine.sampler import Sampled, Sampler
from model_core.engine.scores import sent
from model_core.engine.sequence import Sequence
from model_core.kernels.decode.restrict import restrict
from model_core.kernels.decode.sample import SampleSpace, sample
from model_core.kernels.decode.state import DecodeState, HeldRows


class LateRow(NamedTuple):
    """A row of a graph's logits, and what was computed in it."""

    row: int
    entry: Scheduled


class LateRows:
    """Samples from what a graph has left in its logits, before any other graph writes there.

    slots: those that the graphs do not sample: a launch of the same kernels behind the graph does, with masks; and among them
    `special`, which the graphs sample, though not for good: engine/sampler.py does it again, op by op.
    space: of at least as many rows as there are slots.
    """

    def __init__(self, state: DecodeState, sampler: Sampler, space: SampleSpace, *, invariant: bool) -> None:
        self.state, self.sampler, self._space, self._invariant = state, sampler, space, invariant
        self.rules = SlotRules(state, sampler.vocab_size)
        self.slots: set[int | None] = set()
        self.special: set[int | None] = set()
        self._masks = RowMasks(sampler.vocab_size, sampler.device)
        most = state.dump
        fields = [("slots", most, "int64"), ("places", most, "int64"), ("masks", most * self._masks.words, "int32")]
        self._inputs = Packed(fields, sampler.device, copies=3)  # a step in flight, maybe with prompts, and one to fill

    def assign(self, seq: Sequence) -> None:
        """Fill the slot of a sequence that starts or resumes."""
        slot, params = seq.slot, seq.request.params
        assert slot is not None and params.seed is not None
        self.slots.discard(slot)
        self.special.discard(slot)
        if seq.matcher is not None:
            self.slots.add(slot)
        if not self.rules.assign(seq):
            self.slots.add(slot)
            self.special.add(slot)
            self.sampler.assign(slot, params, params.seed, seq.tokens, seq.num_prompt)

    def sample(self, flight: InFlight, places: np.ndarray, rows: list[LateRow], logits: torch.Tensor) -> None:
        """Sample rows of a graph that was launched: now or, where a mask waits for a token, when the step is finished.
        places: of all rows of the graph in the plan."""
        work = partial(self._sample, flight, places, rows, logits)
        if any(entry.waits for _, entry in rows):
            flight.rest.append(work)
        else:
            work()

    def _sample(self, flight: InFlight, places: np.ndarray, rows: list[LateRow], logits: torch.Tensor) -> None:
        rows = [one for one in rows if one.entry.seq.finish is None]  # the matcher of one that has ended may know no next token
        special = [one for one in rows if one.entry.seq.slot in self.special]
        held = [one for one in rows if one.entry.seq.slot not in self.special]
        masks = self._masks.of([entry for _, entry in special])
        for at in sampled_together(len(special), self._invariant):
            sampled = self._again(special[at], logits, None if masks is None else masks[at])
            flight.parts.append(Part.of(places[[row for row, _ in special[at]]], sampled))
        if held:
            self._under_masks(held, logits)

    def _under_masks(self, held: list[LateRow], logits: torch.Tensor) -> None:
        count, seqs = len(held), [entry.seq for _, entry in held]
        inputs = self._inputs.turn()
        inputs["slots"][:count] = [seq.slot for seq in seqs]
        inputs["places"][:count] = [row for row, _ in held]
        self._masks.fill(seqs, inputs["masks"].reshape(-1, self._masks.words))
        self._inputs.send(count * self._masks.words)
        self.kernels(count, logits)()

    def kernels(self, count: int, logits: torch.Tensor) -> Callable[[], None]:
        """What launches those of `count` held rows."""
        slots, places, masks = (self._inputs.device[name] for name in ("slots", "places", "masks"))
        held = HeldRows(places, masks.view(-1, self._masks.words))
        return partial(_choose, logits, slots[:count], self.state, self._space, held)

    def _again(self, special: list[LateRow], logits: torch.Tensor, masks: torch.Tensor | None) -> Sampled:
        rows, chosen = [row for row, _ in special], [entry for _, entry in special]
        slots = self._send([entry.seq.slot for entry in chosen])
        positions = self._send([entry.start + entry.count for entry in chosen])
        params = [entry.seq.request.params for entry in chosen]
        sampled = self.sampler.sample(logits[self._send(rows)], slots, positions, params, forbidden_in(chosen), masks)
        self.state.last_token[slots] = sampled.tokens.clamp(min=0)
        return sampled

    def _send(self, values: list[Any]) -> torch.Tensor:
        return sent(torch.tensor(values, dtype=torch.int64), self.sampler.device)

    def compute(self, logits: torch.Tensor) -> None:
        """Launch every kernel once, over a graph's logits, which are lost; nothing advances."""
        self._inputs.turn()["slots"][:] = self.state.dump
        self._inputs.send()
        self.kernels(1, logits)()
        sample_every_way(self.sampler, logits)


def _choose(logits: torch.Tensor, slots: torch.Tensor, state: DecodeState, space: SampleSpace, held: HeldRows) -> None:
    restrict(logits, slots, state, space, pdl=False, held=held)
    sample(logits, slots, state, space, pdl=False, held=held)
