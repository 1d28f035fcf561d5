"""Masks that may take long, filled beside the engine's thread: a row whose mask is not there in time sits the step out."""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from model_core.dispatch.compile import cores
from model_core.grammar.matcher import Matcher

WAIT_S = 1e-3  # of a whole step for masks that it has begun; most come within 0.1 ms
_MOST_THREADS = 3


class Beside:
    """Threads that fill a mask each, while others use the interpreter: native code does without it. They end when nobody refers
    to this. They are no nicer than others: where cores are short, one that had the interpreter would stop them all."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max(1, min(_MOST_THREADS, cores() - 1)), "mask")

    def begin(self, matchers: Iterable[Matcher]) -> None:
        """Fill the next masks of those for which it was not begun. Nobody else may use their `native` until they are there."""
        for matcher in matchers:
            if matcher.coming is None:
                matcher.coming = self._pool.submit(_filled, matcher.native, matcher.compiled.vocabulary.words)

    def end(self, work: list[tuple[Matcher, int]], masks: np.ndarray) -> None:
        """Write masks that were begun into rows of int32 [rows, words]. Those that do not come in time allow nothing, and their
        matchers have `missed`."""
        wait([matcher.coming for matcher, _ in work if matcher.coming is not None], WAIT_S)
        for matcher, row in work:
            matcher.take(masks, row)


def _filled(native: Any, words: int) -> tuple[np.ndarray, float]:
    """int32 [words], and the seconds of this thread that it took."""
    mask = np.zeros((1, words), dtype=np.int32)
    began = time.thread_time()
    native.fill_next_token_bitmask(mask, 0, False)
    return mask[0], time.thread_time() - began

