"""The waiting line: sequences that have no slot, by rank."""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heapify, heappop, heappush

from model_core.engine.sequence import Sequence


class Line:
    """A heap by (priority, arrival). One that finishes while it waits stays in it until it is met at the head, or until most
    of the heap are such: to find it there would take a search."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], Sequence]] = []
        self._waiting = 0

    def __len__(self) -> int:
        """Those that wait."""
        return self._waiting

    def push(self, seq: Sequence) -> None:
        heappush(self._heap, (seq.rank, seq))
        self._waiting += 1

    def head(self) -> Sequence | None:
        """Who is next; None if nobody waits."""
        while self._heap and self._heap[0][1].finish is not None:
            heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> None:
        """Remove the head, as `head` returned it."""
        heappop(self._heap)
        self._waiting -= 1

    def left(self) -> None:
        """One that waited has its `finish` now."""
        self._waiting -= 1
        if len(self._heap) > 2 * self._waiting + 64:  # finished ones behind a head that waits: drop them in bulk
            self._heap = [item for item in self._heap if item[1].finish is None]
            heapify(self._heap)

    def check(self, waiting: Iterable[Sequence]) -> None:
        """Assert that these wait, in the order of their ranks; for tests."""
        ranked = sorted(waiting, key=lambda seq: seq.rank)
        assert [seq for _, seq in sorted(self._heap) if seq.finish is None] == ranked
        assert len(ranked) == self._waiting
        assert all(self._heap[(at - 1) // 2] < self._heap[at] for at in range(1, len(self._heap))), "not a heap"
