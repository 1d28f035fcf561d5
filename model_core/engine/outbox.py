"""The outbox: token events, from what a step computed, until the engine's thread hands them out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from model_core.engine.plan import StepPlan
from model_core.engine.request import FinishReason, PromptLogprobs, TokenEvent, TokenLogprobs
from model_core.engine.scheduler import Scheduler
from model_core.engine.sequence import Sequence

_event: Callable[[tuple[object, ...]], TokenEvent] = partial(tuple.__new__, TokenEvent)  # of 256: 108 us, TokenEvent() 170


class Outbox:
    """Ends requests, commits steps, and keeps what there is to tell about it. For the engine's thread alone."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._events: list[TokenEvent] = []

    def take(self) -> list[TokenEvent]:
        """All events since the last call, in order."""
        events, self._events = self._events, []
        return events

    def last(self, request_id: str, reason: FinishReason, error: str | None = None) -> None:
        """The last event of a request, whatever the scheduler knows of it."""
        self._events.append(TokenEvent(request_id, [], reason, error=error))

    def end(self, request_id: str, reason: FinishReason, error: str | None = None) -> None:
        """End a request, and tell it; nothing if it is not live."""
        if self._scheduler.finish(request_id, reason):
            self.last(request_id, reason, error)

    def commit(self, plan: StepPlan, tokens: list[int], logprobs: dict[int, list[TokenLogprobs]],
               scored: Iterable[tuple[Sequence, PromptLogprobs | None]]) -> None:
        """The device has done `plan`, the oldest in flight. tokens, logprobs: as of InFlight.collect; scored: of prompts, which
        are told before the tokens, None where logits were not finite."""
        sampling = plan.sampling
        for seq, prompt in scored:
            if seq.finish is None and prompt is None:
                self.end(seq.request_id, "error", "the model produced logits that are not finite numbers")
            elif seq.finish is None:
                self._events.append(TokenEvent(seq.request_id, [], prompt=prompt))
        for seq, token in zip(sampling, tokens, strict=True):
            if token < 0 and seq.finish is None and not seq.sits_out:
                self.end(seq.request_id, "error", seq.why_none(token))
        ended = set(self._scheduler.commit(plan, tokens))
        events = [_event((seq.request_id, [token], seq.finish, logprobs.get(place), None, 0, None, None))
                  for place, (seq, token) in enumerate(zip(sampling, tokens, strict=True))
                  if (seq.finish is None and token >= 0) or seq in ended]  # others sat out, or have had their last event
        if firsts := {seq.request_id: seq for seq in sampling if len(seq.tokens) == seq.num_prompt + 1}:
            events = [firsts[event.request_id].first(event) if event.request_id in firsts else event for event in events]
        self._events += events
