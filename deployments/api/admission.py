"""Who gets in: bounds the sequences an Api replica holds, so that overload is a quick 503, never a growing queue."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from deployments.protocol.errors import draining, overloaded


class Gate:
    """Counts sequences (a request with n=4 is four). `capacity`: how many the engines run at once, asked anew only when
    the limit is about to refuse somebody; on top of it max_queued may wait.
    """

    def __init__(self, capacity: Callable[[], Awaitable[int]], max_queued: int) -> None:
        self.active = 0
        self.is_draining = False
        self._capacity = capacity
        self._max_queued = max_queued
        self._limit = max_queued
        self._ended: deque[float] = deque(maxlen=64)  # when recent sequences ended

    def drain(self) -> None:
        """From now on new requests get a 503; running ones finish."""
        self.is_draining = True

    async def check(self, count: int) -> None:
        """Raises ApiError 503 if `count` more sequences cannot be taken now."""
        if self.is_draining:
            raise draining()
        if self.active + count > self._limit:
            self._limit = self._max_queued + await self._capacity()
        if self.active + count > self._limit:
            raise overloaded(
                f"The server is at its limit of {self._limit} sequences ({self.active} active, {count} asked for). "
                "Please try again later.",
                self._retry_after(self.active + count - self._limit),
            )

    @contextmanager
    def hold(self, count: int) -> Iterator[None]:
        """Counts `count` sequences as active inside the block. No await may come between check() and this."""
        self.active += count
        try:
            yield
        finally:
            self.active -= count
            assert self.active >= 0
            self._ended.extend([time.monotonic()] * min(count, 64))

    def _retry_after(self, excess: int) -> int:
        """Seconds until `excess` sequences will have ended at the current rate, within 1 to 5."""
        if len(self._ended) < 2:
            return 5
        rate = len(self._ended) / max(time.monotonic() - self._ended[0], 1e-3)
        return int(min(max(excess / rate, 1), 5) + 0.999)
