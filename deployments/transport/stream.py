"""Events of one request on their way to one reader."""

from __future__ import annotations

import asyncio
from typing import Any

from model_core.engine.request import TokenEvent
from model_core.errors import MiniLLMError


class Stream:
    """One writer, one reader, one event loop. Invariant: nothing is added after `ended` or `error`.

    link: the connection that the events come over, None for a stream inside one process.
    """

    __slots__ = ("ended", "error", "events", "link", "request_id", "waiter")

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.events: list[TokenEvent] = []
        self.ended = False  # the event with `finish` has come
        self.error: MiniLLMError | None = None
        self.link: Any = None
        self.waiter: asyncio.Future[None] | None = None

    def add(self, event: TokenEvent) -> None:
        assert not self.ended and self.error is None
        self.events.append(event)
        self.ended = event.finish is not None
        self._wake()

    def fail(self, error: MiniLLMError) -> None:
        """The reader gets what has come, then the error; ignored once the stream has ended."""
        if not self.ended and self.error is None:
            self.error = error
            self._wake()

    async def take(self) -> list[TokenEvent]:
        """All events that have come, at least one. Raises the error once they are taken."""
        while not self.events:
            if self.error is not None:
                raise self.error
            self.waiter = asyncio.get_running_loop().create_future()
            try:
                await self.waiter
            finally:
                self.waiter = None
        events, self.events = self.events, []
        return events

    def _wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)
