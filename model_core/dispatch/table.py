"""Which implementation runs for (op, size): plain data, so that calibration can fill it and a person can read it.

Until something was measured the rule is the user's: more than `threshold` tokens run on Triton, fewer on PyTorch (below
that a launch costs more than the fusion saves). An op's size is its tokens; for attention the key/value tokens read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

IMPLEMENTATIONS = ("torch", "triton")
OPS = ("rmsnorm", "add_rmsnorm", "rope_kv_write", "swiglu", "paged_attention")


@dataclass(frozen=True)
class Bucket:
    """One row of an op's table: sizes up to and including `upto` (None: every larger one) run `choice`."""

    upto: int | None
    choice: str
    reason: str
    microseconds: dict[str, float] = field(default_factory=dict)  # candidate -> measured; empty until calibrated

    def __post_init__(self) -> None:
        assert self.choice in IMPLEMENTATIONS and (self.upto is None or self.upto >= 0)


class Table:
    """The buckets of one op, ascending, the last one open-ended. `choose` is a pure function of the size."""

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        limits = [bucket.upto for bucket in buckets]
        assert limits and limits[-1] is None and None not in limits[:-1], limits
        assert limits[:-1] == sorted(set(limits[:-1])), limits  # type: ignore[type-var]
        self.buckets = tuple(buckets)

    def find(self, size: int) -> Bucket:
        for bucket in self.buckets:
            if bucket.upto is None or size <= bucket.upto:
                return bucket
        raise AssertionError("the last bucket is open-ended")

    def choose(self, size: int) -> str:
        return self.find(size).choice


def only(choice: str, reason: str) -> Table:
    """One implementation for every size."""
    return Table([Bucket(None, choice, reason)])


def by_threshold(op: str, threshold: int) -> Table:
    """The uncalibrated rule."""
    unit = "key/value tokens" if op == "paged_attention" else "tokens"
    return Table([
        Bucket(threshold, "torch", f"not measured yet: PyTorch up to {threshold} {unit}"),
        Bucket(None, "triton", f"not measured yet: Triton above {threshold} {unit}"),
    ])
