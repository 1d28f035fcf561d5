"""A launched step: what it computes comes to the host while others are launched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from model_core.engine.clock import Span
from model_core.engine.plan import StepPlan
from model_core.engine.request import TokenLogprobs
from model_core.engine.sampler import Sampled
from model_core.engine.scores import Scores, copied
from model_core.kernels.decode.state import RING


@dataclass
class Part:
    """Rows of a step: row i of `sampled` belongs to plan.sampling[places[i]], or to nobody if that is -1. places: int64."""

    places: np.ndarray
    sampled: Sampled

    @classmethod
    def of(cls, places: np.ndarray, sampled: Sampled) -> Part:
        """Start copying results into pinned memory; they are valid after the step's event."""
        others = (sampled.logprob, sampled.top_ids, sampled.top_logprobs)
        return cls(places, Sampled(copied(sampled.tokens), *(None if one is None else copied(one) for one in others)))

    def tokens(self) -> np.ndarray:
        return self.sampled.tokens.numpy()


@dataclass
class Chosen:
    """Rows that kernels sampled: the tokens of slots at positions, both int64, in DecodeState.chosen. places: as a Part's."""

    places: np.ndarray
    slots: np.ndarray
    positions: np.ndarray
    ring: np.ndarray

    def tokens(self) -> np.ndarray:
        return self.ring[self.slots, self.positions % RING]


@dataclass
class InFlight:
    """A launched step. `collect` waits for the device; nothing before it does. Of two parts that name a sequence the later
    one counts. scores: read them after `collect`.

    rest: what remains to be launched, since it needs the tokens of the step before: rows under a grammar are sampled when
    these tokens tell their masks. `finish` does it; no other step may be launched before."""

    plan: StepPlan
    parts: list[Part | Chosen]
    span: Span
    scores: list[Scores] = field(default_factory=list)
    rest: list[Callable[[], None]] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Whether `collect` is known not to wait."""
        return not self.rest and self.span.over

    def finish(self) -> None:
        """Launch the rest: all steps before this one are committed."""
        if self.rest:
            for work in self.rest:
                work()
            self.rest.clear()
            self.span.end()

    def collect(self) -> tuple[list[int], dict[int, list[TokenLogprobs]]]:
        """Token ids (negative: see Sampled) of plan.sampling and, where asked for, log-probabilities by place. All steps
        before this one are committed."""
        self.finish()
        self.span.wait()
        sampling = self.plan.sampling
        tokens = np.zeros(len(sampling) + 1, dtype=np.int64)  # the last one is nobody's
        logprobs: dict[int, list[TokenLogprobs]] = {}
        for part in self.parts:
            tokens[part.places] = part.tokens()
            if isinstance(part, Part) and part.sampled.logprob is not None:
                for row, place in enumerate(part.places.tolist()):
                    if place >= 0 and (count := sampling[place].request.params.logprobs) is not None:
                        logprobs[place] = [part.sampled.logprobs_of(row, count)]
        return tokens[:-1].tolist(), logprobs
