"""The waterfall of a start-up: what was done, from when to when, counted from the start of the process."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

_BAR = 40  # characters
_EIGHTHS = " ▏▎▍▌▋▊▉"
_imports_seen = False

Timed = Callable[[str], AbstractContextManager[object]]


def untimed(name: str) -> AbstractContextManager[object]:
    """For who does not want to know."""
    return nullcontext()


@dataclass
class Step:
    """Seconds since the process began. Steps of other threads overlap."""

    name: str
    began: float
    ended: float
    note: str = ""

    @property
    def so_far(self) -> float:
        """Seconds since it began, while it lasts."""
        return process_age() - self.began


class StartUp:
    """The steps of one start-up, in the order in which they ended."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    @contextmanager
    def timed(self, name: str) -> Iterator[Step]:
        """A step; what is done with the object that it gives, adding a note, is seen. One that raises is not kept."""
        step = Step(name, process_age(), 0.0)
        yield step
        step.ended = process_age()
        self.steps.append(step)

    def imports(self) -> None:
        """What was before: a step from the start of the process until now, in the first start-up of a process."""
        global _imports_seen
        if not _imports_seen:
            _imports_seen = True
            self.steps.append(Step("imports", 0.0, process_age(), _bytecode_note()))

    def seconds(self) -> dict[str, float]:
        """By name, the seconds that the start-up took longer for it: from the end of the step before. They add up, though
        steps overlap."""
        found: dict[str, float] = {}
        before = self.steps[0].began if self.steps else 0.0
        for step in self.steps:
            found[step.name] = found.get(step.name, 0.0) + step.ended - before
            before = step.ended
        return found

    def lines(self) -> list[str]:
        """For people: a line per step in the order in which they began, with a bar from its begin to its end, and the moment of
        its end after the process's start (or this start-up's, if it is not the first)."""
        return waterfall(self.steps)


def waterfall(steps: list[Step]) -> list[str]:
    """See StartUp.lines."""
    steps = sorted(steps, key=lambda step: (step.began, step.ended))
    origin = steps[0].began if steps else 0.0
    total = max((step.ended - origin for step in steps), default=0.0) or 1e-9
    width = max((len(step.name) for step in steps), default=0)
    lines = []
    for step in steps:
        indent = min(_BAR - 1, int(_BAR * (step.began - origin) / total))
        eighths = round(8 * _BAR * (step.ended - step.began) / total)
        full, rest = divmod(max(1, min(8 * (_BAR - indent), eighths)), 8)
        bar = " " * indent + "█" * full + _EIGHTHS[rest].strip()
        lines.append(f"{step.name:{width}} {step.ended - step.began:6.2f} s |{bar:{_BAR}}| {step.ended - origin:6.2f} s"
                     f"  {step.note}".rstrip())  # fmt: skip
    return lines


def _bytecode_note() -> str:
    """What to know about the imports: without bytecode on disk Python compiles torch's thousand modules at every start (2.5 s
    instead of 1.5 s on a 2-core EPYC)."""
    cached = getattr(sys.modules.get("torch"), "__cached__", None)
    return "" if cached is None or os.path.exists(cached) else "no bytecode on disk, see PYTHONDONTWRITEBYTECODE"


def process_age() -> float:
    """Seconds since this process was started; where /proc does not tell, since this module was imported."""
    return time.monotonic() - _BEGAN


def _process_began() -> float:
    """time.monotonic() of this process's start."""
    now = time.monotonic()
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return now - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError, ValueError, IndexError):
        return now


_BEGAN = _process_began()
