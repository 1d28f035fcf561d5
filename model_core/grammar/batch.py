"""The masks of a step's rows by two calls into native code, not two per row.

Such a call lets other threads have the interpreter, and has to wait until they give it back: one call instead of 32 is not only
faster by itself (75 us instead of 98 for masks of 32 rows, on a 2-core EPYC) but leaves fewer occasions for that.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from model_core.dispatch.compile import cores
from model_core.grammar.matcher import PATIENCE_S_A_TOKEN, Matcher
from model_core.grammar.native import native

_MOST_THREADS = 8
_WORTH_THREADS_S = 400e-6  # of a fill: they are made and joined in each one, which takes 50 us and more
_FILLS = 16  # that threads do after one that took so long; then it is seen again whether they need to


class MaskFiller:
    """Of one thread. Where a fill takes long, native threads share the next ones."""

    def __init__(self) -> None:
        self._alone, self._together = (native.BatchGrammarMatcher(threads) for threads in (1, min(_MOST_THREADS, cores())))
        self._shared = 0  # so many fills are still to be done by threads
        self._one_by_one = False

    def fill(self, matchers: list[Matcher], outputs: Sequence[tuple[Sequence[int], int]], masks: np.ndarray) -> None:
        """Row i of int32 [at least len(matchers), words] becomes the mask of what may follow the output tokens[start:] with
        (tokens, start) = outputs[i]: as Matcher.follow and fill do it."""
        if all(matcher.failure is None and matcher.unread(*output) == 1
               for matcher, output in zip(matchers, outputs, strict=True)):  # fmt: skip
            ids = [tokens[-1] for tokens, _ in outputs]
            accepted = native.BatchGrammarMatcher.batch_accept_token([matcher.native for matcher in matchers], ids, False)
            for matcher, token, fits in zip(matchers, ids, accepted, strict=True):
                matcher.note(token, bool(fits))
        else:
            for matcher, output in zip(matchers, outputs, strict=True):
                matcher.follow(*output)
        began = time.perf_counter()
        if self._one_by_one or any(matcher.failure is not None for matcher in matchers):
            for row, matcher in enumerate(matchers):
                matcher.fill(masks, row)
            took = time.perf_counter() - began
        else:
            batch = self._together if self._shared else self._alone
            batch.batch_fill_next_token_bitmask([matcher.native for matcher in matchers], masks, None, False)
            took = time.perf_counter() - began
            for row, matcher in enumerate(matchers):
                matcher.finish(masks, row, took / len(matchers))
        self._shared = self._shared - 1 if self._shared else _FILLS * (took > _WORTH_THREADS_S)
        self._one_by_one = took > PATIENCE_S_A_TOKEN  # to see whose grammar it is: fill ends one that goes on like this
