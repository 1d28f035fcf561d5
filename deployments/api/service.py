"""What the endpoints share: the transport to the engines, the tokenizer, limits, admission, metrics."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, TypeVar

import orjson

from deployments.api.admission import Gate
from deployments.api.metrics import Metrics
from deployments.protocol.errors import ApiError, loading, model_not_found
from deployments.protocol.limits import Limits
from deployments.tools.family import ToolParser, choose
from deployments.transport.base import NotReady, Transport
from model_core.engine.request import EngineInfo, EngineStats
from model_core.grammar.calls import Control
from model_core.tokenizer.tokenizer import Tokenizer

INLINE_CHARS = 2000  # longer texts are tokenised in a thread; 2000 characters take 0.8 to 1.7 ms (SmolLM2, EPYC)
PROBE_TIMEOUT_S = 2.0

T = TypeVar("T")


class Service:
    """One per Api replica. everyone: the metrics of all of them, if there are others."""

    def __init__(
        self, transport: Transport, tokenizer: Tokenizer, limits: Limits, *, version: str, tool_parser: ToolParser = "auto",
        everyone: Callable[[], Awaitable[list[Metrics]]] | None = None,
    ) -> None:  # fmt: skip
        self.transport = transport
        self.tokenizer = tokenizer
        self.calls = choose(tool_parser, tokenizer)
        # tags of calls that are control tokens: they must be seen in the text, although the others are not
        texts = {i: tokenizer.token_text(i) for i in tokenizer.special_ids}
        self.call_tags = {i: text for i, text in texts.items() if text in self.calls.tags}
        self.control = tuple(Control(i, text) for i, text in self.call_tags.items())
        self.limits = limits
        self.version = version
        self.created = int(time.time())
        self.metrics = Metrics()
        self._everyone = everyone
        self.gate = Gate(self._capacity, limits.max_queued_requests)
        self.stopping = asyncio.Event()  # set: whatever still runs ends now, with an error
        # text work only; two threads keep one long prompt from delaying the next, and leave the GIL to the event loop
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")
        self._info: EngineInfo | None = None
        self._fingerprint = ""
        # every token has at most this many bytes, so a text of B bytes has at least B / longest tokens
        self._longest_token = max((len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)), default=1) or 1

    async def stop(self, grace_s: float) -> None:
        """Take no new requests; those that still run after grace_s end with an error. Returns when none is left."""
        self.gate.drain()
        end = time.monotonic() + grace_s
        while self.gate.active:
            if time.monotonic() >= end:
                self.stopping.set()
            await asyncio.sleep(0.02)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def info(self) -> EngineInfo:
        """The served model. Raises ApiError 503 until a model replica has answered once."""
        if self._info is None:
            try:
                self._info = await asyncio.wait_for(self.transport.info(), PROBE_TIMEOUT_S)
            except (NotReady, asyncio.TimeoutError):
                raise loading() from None
            told = {"version": self.version, **asdict(self._info)}
            del told["source"], told["pool_tokens"]  # differ from start to start
            state = orjson.dumps(told)
            self._fingerprint = f"mini-llm-{self.version}-{hashlib.sha256(state).hexdigest()[:8]}"
        return self._info

    @property
    def fingerprint(self) -> str:
        """Constant while the process lives; differs when version, weights, kernels or settings that decide about numbers do."""
        return self._fingerprint

    async def stats(self) -> list[EngineStats]:
        """A reading of every model replica that answers in time; empty if none does."""
        try:
            return await asyncio.wait_for(self.transport.stats(), PROBE_TIMEOUT_S)
        except (NotReady, asyncio.TimeoutError):
            return []

    async def dispatch_table(self) -> list[dict[str, Any]]:
        """Of a model replica. Raises ApiError 503 if none answers in time."""
        try:
            return await asyncio.wait_for(self.transport.dispatch_table(), PROBE_TIMEOUT_S)
        except (NotReady, asyncio.TimeoutError):
            raise loading() from None

    def own_metrics(self) -> Metrics:
        self.metrics.active = self.gate.active
        return self.metrics

    async def all_metrics(self) -> list[Metrics]:
        """Of all Api replicas that answer; a proxy asks one or the other."""
        found = [] if self._everyone is None else await self._everyone()
        return found or [self.own_metrics()]

    async def is_ready(self) -> bool:
        if self.gate.is_draining or not await self.stats():
            return False
        try:
            await self.info()
        except ApiError:
            return False
        return True

    async def check_model(self, name: str) -> EngineInfo:
        """The model a request names; no name means the served one. Raises ApiError 404 or 503."""
        info = await self.info()
        if name and name != info.model:
            raise model_not_found(name, [info.model])
        return info

    async def text_work(self, chars: int, work: Callable[[], T]) -> T:
        """Runs tokenisation inline when short (a thread hop costs more), in the pool when long."""
        if chars <= INLINE_CHARS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def least_tokens(self, text: str) -> int:
        """A lower bound of the text's tokens, without tokenising it."""
        return len(text) // self._longest_token  # every character has at least one byte

    async def _capacity(self) -> int:
        info = await self.info()
        return info.max_seqs * max(len(await self.stats()), 1)
