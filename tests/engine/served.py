"""A running engine as its tests ask it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from model_core.engine.engine import Engine
from model_core.engine.request import EngineStats, Request, TokenEvent
from tests.waiting import wait_until

SECONDS = 170.0  # of patience: kernels in an interpreter, or compiled for the first time


class Served:
    """An engine, started here, and what it told of each request."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.events: dict[str, list[TokenEvent]] = {}
        self.times: dict[str, list[float]] = {}  # of time.monotonic(), at which they came
        self.changed = threading.Condition()
        self._late: list[TokenEvent] = []
        engine.start(self.on_step)

    def on_step(self, events: list[TokenEvent]) -> None:
        with self.changed:
            for event in events:
                self.hear(event)
            self.changed.notify_all()

    def hear(self, event: TokenEvent) -> None:
        """In the engine's thread."""
        self._late += [event] if self.finish(event.request_id) else []
        self.events.setdefault(event.request_id, []).append(event)
        self.times.setdefault(event.request_id, []).append(time.monotonic())

    def submit(self, *requests: Request) -> None:
        """What was told of others of their names that have ended is forgotten."""
        for request in requests:
            if self.finish(request.request_id):
                del self.events[request.request_id], self.times[request.request_id]
            self.engine.submit(request)

    def until(self, true: Callable[[], object]) -> None:
        with self.changed:
            assert self.changed.wait_for(true, SECONDS), f"{self.finishes()} {self.engine.stage} {self.engine.failure}"

    def wait(self, *names: str) -> None:
        """Until these requests have ended."""
        self.until(lambda: all(self.finish(name) for name in names))

    def ask(self, *requests: Request) -> dict[str, list[int]]:
        """All of them at once; their tokens."""
        self.submit(*requests)
        self.wait(*(request.request_id for request in requests))
        return {request.request_id: self.tokens(request.request_id) for request in requests}

    def tokens(self, name: str) -> list[int]:
        return [token for event in self.events.get(name, []) for token in event.token_ids]

    def logprobs(self, name: str) -> list:
        """Of its tokens; of its prompt's before them, with their ranks."""
        told = self.events[name]
        prompt = [pair for event in told if event.prompt for pair in zip(event.prompt.own, event.prompt.ranks, strict=True)]
        return prompt + [one for event in told for one in event.logprobs or []]

    def finish(self, name: str) -> str | None:
        told = self.events.get(name)
        return told[-1].finish if told else None

    def finishes(self) -> dict[str, str]:
        """Of those that have ended."""
        return {name: finish for name in self.events if (finish := self.finish(name))}

    def close(self) -> EngineStats:
        """Whatever happened: nothing followed a last event, and where all have ended all pages are available."""
        if self.engine.alive and len(self.finishes()) == len(self.events):
            wait_until(lambda: at_rest(self.engine))  # a step beyond the last end may be in flight
        self.engine.shutdown()
        assert not self._late
        return self.engine.stats()


def at_rest(engine: Engine) -> bool:
    """Nobody runs or waits, and all pages are available."""
    stats = engine.stats()
    return (stats.pages_free + stats.pages_cached, stats.running, stats.waiting) == (stats.pages_total, 0, 0)
