"""Which implementation computes each part of a decode step: measured in whole steps of the chain that serves, with its weights.

A kernel's time depends on its neighbours: their wishes for shared memory and registers decide what overlaps, so the tile that
is fastest alone may cost a step a third (Llama-2-7B on an H100). Therefore a coordinate descent: from the defaults, one choice
after the other takes what makes the whole step fastest, beside the best of the choices before it.

Kernels are specialised on the width of their accumulator, not on the rows of a batch, so one measurement serves every bucket
whose kernels are the same: the nearest of 1, 8, 16, 32, 64, 128 and the largest. Beyond 128 rows an accumulator is not wide
enough and weights are read again: those buckets follow the largest (with the choices of 128 rows, 160 took TinyLlama longer
than 256).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from model_core.dispatch.compile import compile_ahead
from model_core.dispatch.measured import CHOICES, Candidate, Measured, choose, reason, tried, with_choice
from model_core.dispatch.steps import StepTimer, step_call, step_layers
from model_core.dispatch.tiles import MOST_ROWS, NEAR, PRODUCTS, StepTiles, default_tiles
from model_core.kernels.decode.partition import DRIVERS_CHOICE
from model_core.kernels.decode.tiles import columns
from model_core.model.decode import DecodeChain
from model_core.weights.progress import Progress

REPRESENTATIVE = (1, 8, 16, 32, 64, 128)  # rows
TIE = 0.01  # share by which the default may be slower: less is noise, and would choose otherwise at the next start
_KERNELS_OF_A_STEP = 12  # about, for the progress bar

Step = tuple[int, StepTiles, bool]  # rows, tiles, whether its contexts are long
Timer = Callable[..., float]  # (rows, tiles, far) -> microseconds
Ahead = Callable[..., dict[int, str]]


class Steps(Progress):
    """Progress in things, not bytes."""

    def _line(self, now: float) -> str:
        total, done = max(self._total or 1, 1), self._done
        share = min(1.0, done / total)
        rate = done / max(now - self._started, 1e-6)
        left = f", {max(0.0, total - done) / rate:.0f} s left" if rate > 0 else ""
        return f"{self._label} [{'#' * round(30 * share):.<30}] {min(done, total)} of {total}{left}"

    def end(self) -> None:
        self._write(f"{self._label}: {self._done} in {time.monotonic() - self._started:.1f} s")


def calibrate(chain: DecodeChain, buckets: list[int], progress: Progress, *, timer: Timer | None = None,
              workers: int | None = None, ahead: Ahead = compile_ahead) -> dict[int, Measured]:  # fmt: skip
    """Measure steps of these buckets of rows, and choose. Before anything is captured or served; a step afterwards finds
    nothing changed but pages that nobody holds and the chain's buffers.

    timer, ahead: for tests. workers: processes that compile.
    """
    points, compiled = representatives(buckets), _Compiled(chain, ahead, workers)
    config, dtype = chain.model.config, chain.model.dtype
    best = {rows: default_tiles(config, rows, dtype) for rows in points}
    plan = {op: {rows: tried(config, op, rows, dtype) for rows in points} for op in CHOICES}
    compiled.add(((rows, with_choice(best[rows], op, choice), op == "far") for op in CHOICES for rows in points
                  for choice in plan[op][rows]), progress)  # fmt: skip
    own = StepTimer(chain, points[-1]) if timer is None else None
    try:
        found = _descend(chain, best, plan, timer or own, compiled, progress)  # type: ignore[arg-type]
    finally:
        if own is not None:
            own.close()
    measured = {rows: _conclude(rows, step_layers(config), best[rows], found[rows]) for rows in points}
    return {bucket: measured[nearest(bucket, points)] for bucket in buckets}


def _descend(chain: DecodeChain, best: dict[int, StepTiles], plan: dict[str, dict[int, list[Any]]], timer: Timer,
             compiled: _Compiled, progress: Progress) -> dict[int, dict[str, tuple[Candidate, ...]]]:  # fmt: skip
    """Moves `best` (rows -> tiles) choice by choice; what was measured, by rows and choice. All numbers of rows take a turn
    together, so that what has to be compiled for it is compiled at once."""
    found: dict[int, dict[str, tuple[Candidate, ...]]] = {rows: {} for rows in best}
    progress.begin("calibration, measuring", sum(len(choices) for points in plan.values() for choices in points.values()))
    for op, points in plan.items():
        steps = {rows: [with_choice(best[rows], op, choice) for choice in choices] for rows, choices in points.items()}
        # Kernels are specialised on how the kernel before leaves the stream: what was chosen since may need others.
        far = op == "far"
        compiled.add((rows, tiles, far) for rows in points for tiles in steps[rows])
        for rows, choices in points.items():
            candidates = []
            for choice, tiles in zip(choices, steps[rows], strict=True):
                chain.reserve(rows, tiles)
                step = rows, tiles, far
                candidates.append(_measure(timer, step, choice, compiled.problem(step)))
                progress.advance(1)
            found[rows][op] = tuple(candidates)
            chosen = choose(found[rows][op], TIE)
            best[rows] = with_choice(best[rows], op, choices[0] if chosen is None else chosen)
            if chosen is None and op == CHOICES[0]:  # a default of a product fails: go on from what fits everywhere
                for product in PRODUCTS:
                    best[rows] = with_choice(best[rows], product, plan[product][rows][-1])
    progress.end()
    return found


def representatives(buckets: list[int]) -> list[int]:
    """The buckets that are measured: at least one of each width of kernels."""
    points = {bucket for bucket in buckets if bucket in REPRESENTATIVE} | {max(buckets)}
    for bucket in sorted(buckets, reverse=True):
        if _width(bucket) not in map(_width, points):
            points.add(bucket)
    return sorted(points)


def nearest(bucket: int, points: list[int]) -> int:
    """The measured bucket that speaks for this one."""
    return min((point for point in points if _width(point) == _width(bucket)), key=lambda point: (abs(point - bucket), point))


def _width(rows: int) -> tuple[bool, int, bool]:
    """What kernels for so many rows are specialised on, and whether they read the weights several times."""
    return rows <= MOST_ROWS, columns(rows), rows > columns(rows)


class _Compiled:
    """Steps whose kernels were compiled ahead, and which of them took a compiler down: those must not be launched."""

    def __init__(self, chain: DecodeChain, ahead: Ahead, workers: int | None) -> None:
        self._chain, self._ahead, self._workers = chain, ahead, workers
        self._problems: dict[Step, str | None] = {}

    def add(self, steps: Iterable[Step], progress: Progress | None = None) -> None:
        """Compile what steps need that were not given before."""
        new = [step for step in dict.fromkeys(map(_launches, steps)) if step not in self._problems]
        if not new:
            return
        for rows, tiles, _ in new:
            self._chain.reserve(rows, tiles)
        # two layers: the first reads what the embedding leaves, the others what `down` leaves
        jobs = [step_call(self._chain, dump_rows(self._chain, rows), tiles, 2, far) for rows, tiles, far in new]
        options: dict[str, Any] = {}
        if progress is not None:
            points = len({rows for rows, *_ in new})
            progress.begin("calibration, compiling", len(new) + (_KERNELS_OF_A_STEP - 1) * points)
            options["progress"] = progress
        died = self._ahead(jobs, self._workers, **options)
        if progress is not None:
            progress.end()
        self._problems |= {step: died.get(index) for index, step in enumerate(new)}

    def problem(self, step: Step) -> str | None:
        return self._problems.get(_launches(step))


def _launches(step: Step) -> Step:
    """Stands for all steps of the same kernels."""
    rows, tiles, far = step
    used = replace(tiles, shared=DRIVERS_CHOICE, attention=tiles.attention_to(longest=NEAR + far), far=None)
    return rows, used, far


def dump_rows(chain: DecodeChain, rows: int) -> torch.Tensor:
    """A batch of nobody: every row is the dump slot, at position 0 of page 0."""
    return torch.full((rows,), chain.state.dump, dtype=torch.int64, device=chain.q.device)


def _measure(timer: Timer, step: Step, choice: Any, problem: str | None) -> Candidate:
    if problem is not None:
        return Candidate(choice, None, problem)
    try:
        return Candidate(choice, round(timer(*step), 2))
    except Exception as error:  # a kernel that does not compile or launch here: another one serves
        lines = str(error).strip().splitlines() or [""]
        return Candidate(choice, None, f"{type(error).__name__}: {lines[0][:160]}")


def _conclude(rows: int, layers: int, tiles: StepTiles, found: dict[str, tuple[Candidate, ...]]) -> Measured:
    return Measured(rows, layers, found, tiles, {op: reason(found[op], getattr(tiles, op), layers) for op in CHOICES})
