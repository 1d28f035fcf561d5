"""Step records: what each engine step did and how long its parts took, in a ring that costs nothing when unread."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from typing import NamedTuple

from model_core.engine.clock import Span
from model_core.engine.flight import InFlight
from model_core.engine.request import STEP_TOKENS


class StepRecord(NamedTuple):
    """One engine step. Times in microseconds; `at` is time.time() when the step was launched, and so are the counts.

    gpu_us: from the step's first graph to its last copy, on the device; idle_us: from the end of the step before to that
    graph, 0 if the engine had nothing to do meanwhile. Both are 0 on a CPU. Where a step's graph is done before there are masks
    for its rows under a grammar, gpu_us counts the wait for them.
    """

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
    wait_us: int = 0
    emit_us: int = 0
    gpu_us: int = 0
    idle_us: int = 0


class Launched(NamedTuple):
    """A step in flight, the one that the device did just before it (None: it had nothing to do), and its record so far."""

    flight: InFlight
    before: Span | None
    record: StepRecord

    def finished(self, wait: float, emit: float) -> StepRecord:
        """The whole record, of a step that was collected. wait, emit: seconds."""
        span = self.flight.span
        return self.record._replace(wait_us=us(wait), emit_us=us(emit), gpu_us=span.microseconds(),
                                    idle_us=span.since(self.before) if self.before else 0)


class StepRing:
    """The last `size` step records; appending drops the oldest. Safe to read from another thread.

    Totals of all steps, in seconds: gpu_busy, while a step was on the device, and gpu_idle, between two while there was work.
    gpu_us: of the newest record. step_tokens, computed_tokens: as in EngineStats.
    """

    def __init__(self, size: int = 4096) -> None:
        self._ring: deque[StepRecord] = deque(maxlen=size)
        self.gpu_busy = self.gpu_idle = 0.0
        self.gpu_us = 0
        self.step_tokens = [0] * (len(STEP_TOKENS) + 1)
        self.computed_tokens = 0

    def append(self, record: StepRecord) -> None:
        self._ring.append(record)
        tokens = record.decodes + record.prefill_tokens
        self.step_tokens[bisect_left(STEP_TOKENS, tokens)] += 1
        self.computed_tokens += tokens
        self.gpu_us = record.gpu_us
        self.gpu_busy += 1e-6 * record.gpu_us
        self.gpu_idle += 1e-6 * record.idle_us

    def last(self, count: int) -> list[StepRecord]:
        """The newest `count` records, oldest first."""
        return list(self._ring)[-count:]


def us(seconds: float) -> int:
    return int(1e6 * seconds)
