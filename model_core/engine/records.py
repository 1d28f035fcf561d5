"""Step records: what each engine step did and how long its parts took, in a ring that costs nothing when unread."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple


class StepRecord(NamedTuple):
    """One engine step. Times in microseconds; `at` is time.time() when the step was launched."""

    step: int
    at: float
    decodes: int
    prefill_tokens: int
    running: int
    waiting: int
    pages_free: int
    preempted: int
    schedule_us: int
    launch_us: int
    wait_us: int
    emit_us: int


class StepRing:
    """The last `size` step records; appending drops the oldest. Safe to read from another thread."""

    def __init__(self, size: int = 4096) -> None:
        self._ring: deque[StepRecord] = deque(maxlen=size)

    def append(self, record: StepRecord) -> None:
        self._ring.append(record)

    def last(self, count: int) -> list[StepRecord]:
        """The newest `count` records, oldest first."""
        return list(self._ring)[-count:]
