"""The masks of a step's rows by few calls into native code, not one per row; of many rows by several threads.

Such a call lets other threads have the interpreter, and has to wait until they give it back: one call instead of 32 is not only
faster by itself (75 us instead of 98 for masks of 32 rows, on a 2-core EPYC) but leaves fewer occasions for that. Tokens are
given to the matchers one by one (26 us instead of 21): what native code raises is then the fault of one sequence.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np

from model_core.dispatch.compile import cores
from model_core.grammar.beside import Beside
from model_core.grammar.matcher import SLOW_S, Matcher
from model_core.grammar.native import native

logger = logging.getLogger("mini_llm.grammar")

_MOST_HELPERS = 3
_SHARE_S = 300e-6  # of native work, for which another thread is asked


class Filler:
    """Masks of some matchers, in this thread."""

    def __init__(self) -> None:
        self._batch = native.BatchGrammarMatcher(1)

    def fill(self, matchers: list[Any], rows: list[int], masks: np.ndarray) -> float:
        """Of native matchers; seconds of this thread that it took."""
        began = time.thread_time()
        self._batch.batch_fill_next_token_bitmask(matchers, masks, rows, False)
        return time.thread_time() - began


class Helper:
    """A thread that fills masks. It waits between steps: to make and join one for each, as xgrammar does, takes longer than
    most fills. Ends when nobody refers to it."""

    def __init__(self) -> None:
        self._jobs, self._done = SimpleQueue[Any](), SimpleQueue[Any]()
        threading.Thread(target=_help, args=(self._jobs, self._done), name="masks", daemon=True).start()

    def __del__(self) -> None:
        self._jobs.put(None)

    def begin(self, matchers: list[Any], rows: list[int], masks: np.ndarray) -> None:
        self._jobs.put((matchers, rows, masks))

    def end(self) -> float | Exception:
        """Seconds that it took, or what the native code raised."""
        found: float | Exception = self._done.get()
        return found


def _help(jobs: SimpleQueue[Any], done: SimpleQueue[Any]) -> None:
    filler = Filler()
    while (job := jobs.get()) is not None:
        try:
            done.put(filler.fill(*job))
        except Exception as error:
            done.put(error)


class MaskFiller:
    """Of one thread. Where fills of many rows take long, others share them; slow grammars are left to `Beside`."""

    def __init__(self) -> None:
        self._own, self._beside = Filler(), Beside()
        self._helpers: list[Helper] = []
        self._took = 0.0  # of the last fill, seconds of all threads
        self._one_by_one = False

    def begin(self, matchers: list[Matcher], outputs: Sequence[tuple[Sequence[int], int]]) -> None:
        """What `fill` will be asked for, of slow grammars, while something else is done."""
        for matcher, output in zip(matchers, outputs, strict=True):
            matcher.follow(*output)
        self._beside.begin(matcher for matcher in matchers if matcher.failure is None)

    def fill(self, matchers: list[Matcher], outputs: Sequence[tuple[Sequence[int], int]], masks: np.ndarray,
             rows: Sequence[int] | None = None) -> None:  # fmt: skip
        """Row i, or rows[i], of int32 [rows, words] becomes the mask of what may follow the output tokens[start:] with
        (tokens, start) = outputs[i]: as Matcher.follow and fill do it. Where a matcher has `missed` afterwards, nothing may."""
        for matcher, output in zip(matchers, outputs, strict=True):
            matcher.follow(*output)
        quick, slow = list[tuple[Matcher, int]](), list[tuple[Matcher, int]]()
        for matcher, row in zip(matchers, range(len(matchers)) if rows is None else rows, strict=True):
            (slow if matcher.compiled.slow and matcher.failure is None else quick).append((matcher, row))
        if slow:
            self._beside.begin(matcher for matcher, _ in slow)
        if quick:
            self._now(quick, masks)
        if slow:
            self._beside.end(slow, masks)

    def _now(self, work: list[tuple[Matcher, int]], masks: np.ndarray) -> None:
        longest = None
        if not self._one_by_one and all(matcher.failure is None for matcher, _ in work):
            try:
                longest = self._share(work, masks)
            except Exception:  # whosever it is, it is found below
                logger.exception("masks could not be filled together")
        if longest is None:
            began = time.thread_time()
            for matcher, row in work:
                matcher.fill(masks, row)
            self._took = longest = time.thread_time() - began
        self._one_by_one = longest > SLOW_S  # to see whose grammar it is

    def _share(self, work: list[tuple[Matcher, int]], masks: np.ndarray) -> float:
        """Seconds of the slowest thread."""
        count = len(work)
        shares = 1 + min(_MOST_HELPERS, cores() - 1, count - 1, int(self._took / _SHARE_S))
        while len(self._helpers) < shares - 1:
            self._helpers.append(Helper())
        parts = [work[count * share // shares : count * (share + 1) // shares] for share in range(shares)]
        jobs = [([matcher.native for matcher, _ in part], [row for _, row in part], masks) for part in parts]
        asked = list(zip(self._helpers, jobs[1:], strict=False))
        for helper, job in asked:
            helper.begin(*job)
        try:
            times = [self._own.fill(*jobs[0])]
        finally:  # whatever becomes of it: the next fill must not meet what this one asked for
            told = [helper.end() for helper, _ in asked]
        for one in told:
            if isinstance(one, Exception):
                raise one
            times.append(one)
        for part, took in zip(parts, times, strict=True):
            for matcher, row in part:
                matcher.finish(masks, row, took / len(part))
        self._took = sum(times)
        return max(times)
