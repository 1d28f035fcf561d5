"""An engine without a model: it makes one token per running request and step, at a chosen pace.

For measuring and testing everything around the engine. Use it in place of deployments.app:build:

    import_path: benchmarks.fake_engine:build
    args: {model: <a folder with a tokenizer>, step_ms: 20, ...}
"""

# No `from __future__ import annotations`: Serve reads the builder's annotation and wants the class, not its name.

import json
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from deployments.replica import EngineLike, ReplicaSpec
from deployments.settings import AppArgs
from model_core.engine.request import EngineInfo, EngineStats, Request, TokenEvent, TokenLogprobs
from model_core.errors import EngineDead, RequestError

CONTEXT = 8192


@dataclass
class _Live:
    request: Request
    tokens: Iterator[int]
    left: int
    begun: float | None  # time.monotonic(), until its first token


class FakeEngine:
    """Same methods as model_core.engine.engine.Engine. Tokens are drawn from `ids` by a generator seeded per request:
    the same request gets the same tokens. Times of aborts are kept for tests. trace: a file for what a benchmark must know
    to tell how long tokens travel: per step a line [time.time(), seeds of the requests whose first token it made, CPU seconds
    of the engine's thread so far]."""

    def __init__(
        self, ids: list[int], *, step_s: float, max_seqs: int = 512, name: str = "fake", trace: str | None = None
    ) -> None:
        self.info = EngineInfo(name, "disk", "llama", 1, "float32", "cpu", CONTEXT, CONTEXT * max_seqs, max_seqs,
                               max(ids) + 1, ())  # fmt: skip
        self.stage = "not started"
        self.failure: str | None = None
        self.step_s = step_s
        self.aborted: dict[str, float] = {}  # request id → time.monotonic() at which its pages would be free
        self.hang = threading.Event()
        self._ids = ids
        self._inbox: queue.SimpleQueue[Request | str | None] = queue.SimpleQueue()
        self._live: dict[str, _Live] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._trace = open(trace, "w", buffering=1) if trace else None  # noqa: SIM115  (lives as long as the process)
        self._begun: list[int | None] = []
        self._steps = self._tokens = self._prompt_tokens = 0
        self._progress_at = time.monotonic()
        self._on_step: Callable[[list[TokenEvent]], None] = lambda events: None

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self.failure is None

    def start(self, on_step: Callable[[list[TokenEvent]], None]) -> None:
        self._on_step = on_step
        self._thread.start()

    def prepare(self, request: Request) -> None:
        """Nothing to compile: its tokens are what they are."""

    def submit(self, request: Request) -> None:
        if not self.alive:
            raise EngineDead(f"the engine is not running: {self.failure or self.stage}")
        if len(request.prompt_ids) + request.params.max_tokens > CONTEXT:
            raise RequestError(f"prompt + max_tokens is over the context of {CONTEXT}", param="max_tokens",
                               code="context_length_exceeded")  # fmt: skip
        self._inbox.put(request)

    def abort(self, request_id: str) -> None:
        self._inbox.put(request_id)

    def stats(self) -> EngineStats:
        busy = bool(self._live)
        return EngineStats(
            running=len(self._live), waiting=self._inbox.qsize(), pages_total=512, pages_free=512 - len(self._live),
            pages_cached=0, steps=self._steps, prompt_tokens=self._prompt_tokens, generation_tokens=self._tokens,
            prefix_queries=self._prompt_tokens, prefix_hits=0, preemptions=0, step_ms=1e3 * self.step_s,
            last_step_age_s=time.monotonic() - self._progress_at if busy else 0.0)  # fmt: skip

    def dispatch_table(self) -> list[dict[str, Any]]:
        return [{"op": "all", "chosen": "fake"}]

    def shutdown(self) -> None:
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(10)

    def _run(self) -> None:
        due = time.monotonic()
        try:
            while self._read(wait=not self._live):
                due = max(due + self.step_s, time.monotonic())
                self.stage = f"computing step {self._steps}"
                if not self._wait_until(due):
                    break
                while self.hang.is_set():
                    time.sleep(0.01)
                events = [self._token(live) for live in [*self._live.values()]]
                self._steps += 1
                self._tokens += len(events)
                self._progress_at = time.monotonic()
                if self._trace:
                    self._trace.write(json.dumps([time.time(), self._begun, time.thread_time()]) + "\n")
                    self._begun = []
                if events:
                    self._on_step(events)
        except BaseException as error:
            self.failure = f"{type(error).__name__}: {error}"
            self._on_step([TokenEvent(key, [], "error", error=self.failure) for key in self._live])
        self.stage = "stopped"

    def _wait_until(self, due: float) -> bool:
        """Sleeps, as a launched GPU step would let the host sleep, but acts on aborts and new requests at once."""
        while (left := due - time.monotonic()) > 0:
            try:
                item = self._inbox.get(timeout=left)
            except queue.Empty:
                return True
            if item is None:
                return False
            self._take(item)
        return True

    def _read(self, wait: bool) -> bool:
        while True:
            try:
                item = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if item is None:
                return False
            self._take(item)
            wait = False

    def _take(self, item: Request | str) -> None:
        if isinstance(item, str):
            if self._live.pop(item, None) is not None:
                self.aborted[item] = time.monotonic()
                self._on_step([TokenEvent(item, [], "abort")])
            return
        if item.params.temperature == 66.6:  # how a test asks for a bug in the engine
            raise RuntimeError("a fault was asked for")
        if not self._live:
            self._progress_at = time.monotonic()
        seed = item.params.seed if item.params.seed is not None else len(item.prompt_ids)
        count = item.params.max_tokens
        # drawn at once: a draw per token would be half of what this process spends on it
        self._live[item.request_id] = _Live(item, iter(random.Random(seed).choices(self._ids, k=count)), count,
                                             time.monotonic())  # fmt: skip
        self._prompt_tokens += len(item.prompt_ids)
        if self._trace:
            self._begun.append(item.params.seed)

    def _token(self, live: _Live) -> TokenEvent:
        key, params = live.request.request_id, live.request.params
        token = next(live.tokens)
        live.left -= 1
        logprobs = waits = None
        if live.begun is not None:
            waits, live.begun = (0.0, time.monotonic() - live.begun), None
        if params.logprobs is not None:
            logprobs = [TokenLogprobs(-1.0, [(self._ids[i], -1.0 - i) for i in range(params.logprobs)])]
        if live.left:
            return TokenEvent(key, [token], None, logprobs, waits=waits)
        del self._live[key]
        return TokenEvent(key, [token], "length", logprobs, waits=waits)


class FakeArgs(AppArgs):
    """AppArgs and the pace of the fake engine."""

    step_ms: float = Field(default=20.0, gt=0, description="Milliseconds per step.")
    fake_seqs: int = Field(default=512, ge=1, description="Sequences at once.")
    letters: int | None = Field(default=None, ge=1, description="Only tokens of that many letters; null: any.")
    trace: str | None = Field(default=None, description="File for the times of the steps.")


def load_fake(spec: ReplicaSpec, args: FakeArgs) -> EngineLike:
    from model_core.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Path(spec.local.path))
    ids = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids]
    if args.letters:
        ids = [i for i in ids if len(tokenizer.token_bytes(i)) == args.letters and tokenizer.token_bytes(i).isalpha()]
    return FakeEngine(ids, step_s=args.step_ms / 1e3, max_seqs=args.fake_seqs, name=spec.name, trace=args.trace)


def build(args: FakeArgs) -> Any:
    """The real application around the fake engine."""
    from deployments.app import compose

    return compose(args, partial(load_fake, args=args))
