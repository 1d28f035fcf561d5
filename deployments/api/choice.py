"""One choice of an answer in the making: token events of its sequence in; text, log-probabilities, the finish out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from deployments.api.calls import CallReader
from deployments.api.metrics import Metrics
from deployments.protocol.errors import bad_request, internal_error
from deployments.protocol.responses import Entry
from deployments.tools.pieces import Piece
from model_core.engine.request import UNANSWERABLE, PromptLogprobs, Request, TokenEvent

log = logging.getLogger("mini_llm.api")


class TextStream(Protocol):
    """The part of model_core.tokenizer's Detokenizer that is used here.

    stopped: the stop string that ended the text, "" for something else in the text that did.
    """

    @property
    def stopped(self) -> str | None: ...
    @property
    def tokens_sent(self) -> int: ...

    def push(self, ids: Sequence[int], /) -> str: ...
    def finish(self) -> str: ...


class Choice:
    """Invariants: text after a stop is never given out; every token is counted, also those whose text is dropped;
    a log-probability entry leaves together with the text of its token, or not at all.
    """

    __slots__ = (
        "_detokenizer",
        "_eos_ids",
        "_given",
        "_held",
        "_include_stop",
        "_metrics",
        "cached_tokens",
        "calls",
        "finish",
        "first_token_at",
        "ids",
        "index",
        "last_token_at",
        "prompt",
        "refused",
        "request",
        "sent_at",
        "started_at",
        "stop_reason",
        "tokens",
        "waits",
    )

    def __init__(
        self,
        index: int,
        request: Request,
        detokenizer: TextStream,
        *,
        eos_ids: tuple[int, ...],
        include_stop: bool,
        metrics: Metrics,
        started_at: float,  # of the HTTP request, time.perf_counter
        calls: CallReader | None = None,  # the detokenizer, if tools may be called
    ) -> None:
        self.index = index
        self.request = request
        self.tokens = 0  # generated so far, also those that are never shown
        self.ids: list[int] | None = None  # they themselves, where somebody made it a list
        self.prompt: list[PromptLogprobs] = []  # log-probabilities of its tokens but the first
        self.cached_tokens = 0
        self.finish: str | None = None
        self.refused = False  # by a model replica, before anything was computed
        self.stop_reason: str | int | None = None
        self.calls = calls
        self._detokenizer = detokenizer
        self._eos_ids = eos_ids
        self._include_stop = include_stop
        self._held: list[Entry] = []  # entries of tokens whose text was not yet given out
        self._given = 0  # entries given out
        self._metrics = metrics
        self.started_at = started_at
        self.sent_at: float | None = None  # to the engines
        self.waits: tuple[float, float] | None = None  # seconds in the engine's queue, and from there to the first token
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None

    def feed(self, event: TokenEvent) -> str:
        """Text that may be sent now ("" while a character is incomplete or a stop string may be forming).

        Raises ApiError when the engine gave up on the sequence: 500, or 400 if the request is at fault.
        """
        assert self.finish is None, "event after the end of a choice"
        ids = event.token_ids
        if event.cached_tokens:
            self.cached_tokens = event.cached_tokens
        if event.prompt is not None:
            self.prompt.append(event.prompt)
        if event.waits is not None:
            self.waits = event.waits
            self._metrics.queue_time.observe(event.waits[0])
            self._metrics.prefill_time.observe(event.waits[1])
        if ids:
            now = time.perf_counter()
            if self.last_token_at is None:
                self.first_token_at = now
                self._metrics.time_to_first_token.observe(now - self.started_at)
            else:
                self._metrics.inter_token_latency.observe(now - self.last_token_at)
            self.last_token_at = now
            self.tokens += len(ids)
            if self.ids is not None:
                self.ids += ids
        if event.finish == "error" or event.finish == "abort":
            if event.error is not None and event.error.startswith(UNANSWERABLE):
                raise bad_request(event.error, code="no_token_allowed")
            log.error("request %s ended by the engine: %s %s", event.request_id, event.finish, event.error or "")
            raise internal_error()
        if event.logprobs is not None:
            self._held.extend(map(Entry, ids, event.logprobs))
        if event.finish == "stop" and ids:
            last = ids[-1]
            self.stop_reason = None if last in self._eos_ids else last
            if not self._include_stop:
                ids = ids[:-1]
        text = self._detokenizer.push(ids)
        if event.finish is not None and self._detokenizer.stopped is None:
            text += self._detokenizer.finish()
        if self._detokenizer.stopped is not None:
            self.finish = "stop"
            self.stop_reason = self._detokenizer.stopped or None
        elif event.finish is not None:
            self.finish = event.finish
        return text

    @property
    def reason(self) -> str | None:
        """The finish reason that clients read: that of the sequence, but `tool_calls` for one that stopped with calls."""
        return "tool_calls" if self.finish == "stop" and self.calls is not None and self.calls.begun else self.finish

    def take_pieces(self, text: str) -> list[Piece]:
        """What `feed` gave as text, with the calls around it."""
        return [text] if self.calls is None else self.calls.take()

    def take_entries(self) -> list[Entry]:
        """Log-probability entries of the tokens whose text has been given out since the last call."""
        ready = self._detokenizer.tokens_sent - self._given
        entries, self._held = self._held[:ready], self._held[ready:]
        self._given += len(entries)
        return entries


class LateStop:
    """A TextStream that looks for stop strings only in the text after the first `min_tokens` tokens (as vLLM does)."""

    def __init__(
        self, make: Callable[[list[str], list[int]], TextStream], stop: list[str], before: list[int], min_tokens: int
    ) -> None:
        self._make = make
        self._stop = stop
        self._ids = list(before)
        self._missing = min_tokens
        self._early = make([], self._ids)  # without stop strings
        self._late: TextStream | None = None
        self._pushed_early = 0

    @property
    def stopped(self) -> str | None:
        return None if self._late is None else self._late.stopped

    @property
    def tokens_sent(self) -> int:
        if self._late is None or self._late.tokens_sent == 0:
            return self._early.tokens_sent
        return self._pushed_early + self._late.tokens_sent  # bytes of a cut character went over with the ids

    def push(self, ids: Sequence[int], /) -> str:
        if self._late is not None:
            return self._late.push(ids)
        early, rest = ids[: self._missing], ids[self._missing :]
        self._ids.extend(early)
        self._missing -= len(early)
        self._pushed_early += len(early)
        text = self._early.push(early)
        if self._missing == 0:
            self._late = self._make(self._stop, self._ids)
            text += self._late.push(rest)
        return text

    def finish(self) -> str:
        return (self._late or self._early).finish()
