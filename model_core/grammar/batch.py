"""The masks of a step's rows by few calls into native code, not one per row; of slow grammars by several threads.

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
from model_core.grammar.matcher import PATIENCE_S_A_TOKEN, Matcher
from model_core.grammar.native import native

logger = logging.getLogger("mini_llm.grammar")

_MOST_HELPERS = 3
_SHARE_S = 300e-6  # of native work, for which another thread is asked


class Filler:
    """Masks of some matchers, in this thread."""

    def __init__(self) -> None:
        self._batch = native.BatchGrammarMatcher(1)

    def fill(self, matchers: list[Any], masks: np.ndarray) -> float:
        """Of native matchers; seconds that it took."""
        began = time.perf_counter()
        self._batch.batch_fill_next_token_bitmask(matchers, masks, None, False)
        return time.perf_counter() - began


class Helper:
    """A thread that fills masks. It waits between steps: to make and join one for each, as xgrammar does, takes longer than
    most fills. Ends when nobody refers to it."""

    def __init__(self) -> None:
        self._jobs, self._done = SimpleQueue[Any](), SimpleQueue[Any]()
        threading.Thread(target=_help, args=(self._jobs, self._done), name="masks", daemon=True).start()

    def __del__(self) -> None:
        self._jobs.put(None)

    def begin(self, matchers: list[Any], masks: np.ndarray) -> None:
        self._jobs.put((matchers, masks))

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
    """Of one thread. Where fills take long, others share them."""

    def __init__(self) -> None:
        self._own = Filler()
        self._helpers: list[Helper] = []
        self._took = 0.0  # of the last fill, seconds of all threads
        self._one_by_one = False

    def fill(self, matchers: list[Matcher], outputs: Sequence[tuple[Sequence[int], int]], masks: np.ndarray) -> None:
        """Row i of int32 [at least len(matchers), words] becomes the mask of what may follow the output tokens[start:] with
        (tokens, start) = outputs[i]: as Matcher.follow and fill do it."""
        for matcher, output in zip(matchers, outputs, strict=True):
            matcher.follow(*output)
        longest = None
        if not self._one_by_one and all(matcher.failure is None for matcher in matchers):
            try:
                longest = self._share(matchers, masks)
            except Exception:  # whosever it is, it is found below
                logger.exception("masks could not be filled together")
        if longest is None:
            began = time.perf_counter()
            for row, matcher in enumerate(matchers):
                matcher.fill(masks, row)
            self._took = longest = time.perf_counter() - began
        self._one_by_one = longest > PATIENCE_S_A_TOKEN  # to see whose grammar it is: fill ends one that goes on like this

    def _share(self, matchers: list[Matcher], masks: np.ndarray) -> float:
        """Seconds of the slowest thread."""
        shares = 1 + min(_MOST_HELPERS, cores() - 1, len(matchers) - 1, int(self._took / _SHARE_S))
        while len(self._helpers) < shares - 1:
            self._helpers.append(Helper())
        edges = [len(matchers) * share // shares for share in range(shares + 1)]
        work = [([matcher.native for matcher in matchers[begin:end]], masks[begin:end])
                for begin, end in zip(edges, edges[1:], strict=False)]  # fmt: skip
        asked = list(zip(self._helpers, work[1:], strict=False))
        for helper, job in asked:
            helper.begin(*job)
        try:
            times = [self._own.fill(*work[0])]
        finally:  # whatever becomes of it: the next fill must not meet what this one asked for
            told = [helper.end() for helper, _ in asked]
        for one in told:
            if isinstance(one, Exception):
                raise one
            times.append(one)
        for begin, end, took in zip(edges, edges[1:], times, strict=False):
            for row in range(begin, end):
                matchers[row].finish(masks, row, took / (end - begin))
        self._took = sum(times)
        return max(times)
