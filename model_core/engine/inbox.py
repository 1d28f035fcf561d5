"""The inbox: what other threads leave for the engine's."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from model_core.engine.request import Request

if TYPE_CHECKING:
    from model_core.grammar.matcher import Compiled


class Inbox:
    """Requests with their grammars, and ids of requests to end, in the order in which they came. Any thread may leave them, the
    engine's reads.

    left: ids of requests to end that were not read yet.
    """

    def __init__(self) -> None:
        self.left: set[str] = set()
        self._items: queue.SimpleQueue[tuple[Request, Compiled | None] | str | None] = queue.SimpleQueue()
        self._gate = threading.Lock()
        self._closed = False

    def __len__(self) -> int:
        return self._items.qsize()

    def submit(self, request: Request, grammar: Compiled | None) -> bool:
        """Leave a request; False if nobody would read it."""
        with self._gate:  # who closes the inbox answers all that is in it by then
            if not self._closed:
                self._items.put((request, grammar))
            return not self._closed

    def abort(self, request_id: str) -> None:
        self.left.add(request_id)
        self._items.put(request_id)

    def wake(self) -> None:
        """Whoever waits for something to read goes on without."""
        self._items.put(None)

    def read(self, wait: float | None = 0) -> Iterator[tuple[Request, Compiled | None] | str]:
        """All that is there. wait: seconds at most for the first of it; None: for as long as it takes."""
        while True:
            try:
                item = self._items.get(timeout=wait)
            except queue.Empty:
                return
            wait = 0
            if isinstance(item, str):
                self.left.discard(item)
            if item is not None:
                yield item

    def close(self) -> list[str]:
        """Take no more requests. Returns the ids of those that were not read."""
        with self._gate:
            self._closed = True
            return [item[0].request_id for item in self.read() if isinstance(item, tuple)]
