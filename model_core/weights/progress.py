"""Progress that a person can follow: one redrawn line on a terminal, occasional whole lines in a log."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_UNITS = ("B", "kB", "MB", "GB", "TB")


def format_bytes(count: float) -> str:
    """`count` bytes in decimal units, as networks and disks are sold: 98362432 -> "98.4 MB"."""
    index = 0
    while abs(count) >= 999.5 and index < len(_UNITS) - 1:
        count /= 1000
        index += 1
    return f"{count:.0f} B" if index == 0 else f"{count:.1f} {_UNITS[index]}"


def _format_seconds(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


class Progress:
    """Reports one job at a time: begin, advance..., end. `say` is for the sentences between.

    stream: where it is written (stderr unless given). interval: seconds between reports, by default 0.2 on a terminal
    (the line is redrawn) and 5 elsewhere (whole lines, so that a log stays short). Jobs shorter than one interval
    leave a single line in a log.
    """

    def __init__(self, stream: TextIO | None = None, *, interval: float | None = None) -> None:
        self._stream = stream or sys.stderr
        self._tty = self._stream.isatty()
        self._interval = interval if interval is not None else 0.2 if self._tty else 5.0
        self._label = ""
        self._total: int | None = None
        self._done = self._initial = 0
        self._started = self._reported = 0.0

    def begin(self, label: str, total: int | None, done: int = 0) -> None:
        """Start a job of `total` bytes (None if unknown), of which `done` exist already and do not count as speed."""
        self._label, self._total, self._done, self._initial = label, total, done, done
        self._started = self._reported = time.monotonic()

    def advance(self, nbytes: int) -> None:
        """`nbytes` more are done (negative when bytes had to be thrown away)."""
        self._done += nbytes
        now = time.monotonic()
        if now - self._reported >= self._interval:
            self._reported = now
            self._write(self._line(now), transient=True)

    def end(self) -> None:
        """The job is done: one last line with the mean rate."""
        now = time.monotonic()
        elapsed = max(now - self._started, 1e-6)
        moved = self._done - self._initial
        self._write(f"{self._label}: {format_bytes(self._done)} in {elapsed:.1f} s ({format_bytes(moved / elapsed)}/s)")

    def say(self, text: str) -> None:
        """A sentence of its own."""
        self._write(text)

    def _line(self, now: float) -> str:
        rate = (self._done - self._initial) / max(now - self._started, 1e-6)
        if not self._total:
            return f"{self._label}: {format_bytes(self._done)}, {format_bytes(rate)}/s"
        left = f", {_format_seconds((self._total - self._done) / rate)} left" if rate > 0 else ""
        return (f"{self._label}: {100 * self._done / self._total:.0f} % of {format_bytes(self._total)}, "
                f"{format_bytes(rate)}/s{left}")

    def _write(self, text: str, *, transient: bool = False) -> None:
        start, end = ("\r\x1b[K", "" if transient else "\n") if self._tty else ("", "\n")
        self._stream.write(f"{start}{text}{end}")
        self._stream.flush()


class SilentProgress(Progress):
    """Reports nothing: for libraries and tests that do not want output."""

    def _write(self, text: str, *, transient: bool = False) -> None:
        pass
