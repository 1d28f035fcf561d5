"""When steps ran on the device: a pair of events for each step in flight, used in turn."""

from __future__ import annotations

import torch

MOST_AHEAD = 4  # steps that may be in flight while another one is launched; rings of buffers hold one more


class Span:
    """One step on the device, from its first graph to the end of its last copy. On a CPU, where launching is computing, it
    has no events: it is over when it is waited for, and took no time.

    It begins with the first graph and not with the copies that a graph needs: they count as time between steps, as does
    whatever the host does once the step before has ended.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._begun = False
        if self._cuda:
            self._stream = torch.cuda.default_stream(device)  # an event looks for it longer than it takes to record
            self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def reset(self) -> Span:
        self._begun = False
        return self

    def begin(self) -> None:
        """Mark what is launched next as the beginning, unless there is one."""
        if self._cuda and not self._begun:
            self._begin.record(self._stream)
            self._begun = True

    def end(self) -> None:
        if self._cuda:
            self._end.record(self._stream)

    def wait(self) -> None:
        """Until the device is done with the step. Raises what CUDA raises if a kernel failed."""
        if self._cuda:
            self._end.synchronize()

    @property
    def over(self) -> bool:
        """Whether `wait` is known to return at once."""
        return self._cuda and self._end.query()

    def microseconds(self) -> int:
        """How long the step took. After `wait`."""
        return round(1e3 * self._begin.elapsed_time(self._end)) if self._cuda and self._begun else 0

    def since(self, before: Span) -> int:
        """Microseconds from the end of another step to the beginning of this one. After `wait`."""
        return max(0, round(1e3 * before._end.elapsed_time(self._begin))) if self._cuda and self._begun else 0


class Clock:
    """Spans in turn. A step's span is valid until the step after it has been collected."""

    def __init__(self, device: torch.device) -> None:
        self._spans = [Span(device) for _ in range(MOST_AHEAD + 3)]  # in flight, being launched, and the one before
        self._turn = 0

    def next(self) -> Span:
        self._turn = (self._turn + 1) % len(self._spans)
        return self._spans[self._turn].reset()
