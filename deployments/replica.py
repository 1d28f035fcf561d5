"""The model replica: an engine's thread on one side, Api replicas on the other, and the event loop between them."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

from deployments.broadcast import rank
from deployments.grpc_batch import finish_batches
from deployments.logs import log_to_stderr
from deployments.transport.sender import Link, Links, ReplyTo
from deployments.transport.stream import Stream
from deployments.transport.wire import pack_events
from model_core import head_start
from model_core.engine.config import EngineConfig
from model_core.engine.request import EngineInfo, EngineStats, Request, TokenEvent
from model_core.errors import EngineDead, RequestError
from model_core.grammar.spec import BUSY
from model_core.weights.source import LocalModel, ModelSource, ensure_weights

log = logging.getLogger("mini_llm.replica")

METRICS_PERIOD_S = 1.0
Outcome = tuple[Any, ...]  # ("done",) | ("refused", message, param, code) | ("overloaded" | "lost", message)


class EngineLike(Protocol):
    """The part of model_core.engine.engine.Engine that a replica uses."""

    info: EngineInfo
    stage: str
    failure: str | None

    @property
    def alive(self) -> bool: ...
    def start(self, on_step: Callable[[list[TokenEvent]], None]) -> None: ...
    def prepare(self, request: Request) -> object: ...
    def submit(self, request: Request) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def stats(self) -> EngineStats: ...
    def shutdown(self) -> None: ...
    def dispatch_table(self) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class ReplicaSpec:
    """What a model replica is told.

    local: the weights, as found on the node where the application was built; source and weight_dir: how to get them
    on a node that joined later. name: what clients call the model. max_queued: live requests beyond the engine's
    max_seqs before new ones are refused. stall_timeout_s: seconds without progress after which the engine counts as
    hung.
    """

    local: LocalModel
    source: ModelSource
    weight_dir: str
    engine: EngineConfig
    name: str
    max_queued: int
    stall_timeout_s: float


Loader = Callable[[ReplicaSpec], EngineLike]


def load_engine(spec: ReplicaSpec) -> EngineLike:
    """The real engine. torch is imported here and nowhere else in deployments/."""
    local = spec.local
    if not local.path.exists():
        local = replace(ensure_weights(spec.source, spec.weight_dir), source=local.source)
    if spec.engine.device != "cpu":
        head_start.begin()  # while the import of torch takes its seconds
    from model_core.engine.engine import Engine

    engine = Engine.load(local.path, spec.engine, name=spec.name, source=local.source)
    engine.parts.grammars.prepare()
    return engine


@dataclass(eq=False)
class Job:
    """A live request: where its events go (a link and the number its Api replica gave it, or a stream in this process),
    and the future that ends its call."""

    done: asyncio.Future[Outcome]
    link: Link | None = None
    rid: int = 0
    stream: Stream | None = None

    def end(self, *outcome: str) -> None:
        if not self.done.done():
            self.done.set_result(outcome)


class ModelReplica:
    """One engine. Serve constructs it, calls it through handles, and asks check_health() every few seconds.

    Invariant: a request id is in `_jobs` from just before the engine accepts it until its last event, its abort, or
    the loss of its reader; events of ids that are not are dropped.
    """

    async def __init__(self, spec: ReplicaSpec, load: Loader = load_engine) -> None:  # type: ignore[misc]
        log_to_stderr()
        finish_batches()
        # The engine's thread releases the GIL at each torch op and must get it back from the event loop's thread.
        sys.setswitchinterval(0.0005)
        began = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._jobs: dict[str, Job] = {}
        self._links = Links(self._on_lost)
        # in a thread, so that the replica answers Serve's control calls while the weights are read
        self._engine = await asyncio.to_thread(load, spec)
        self._stall_timeout_s = spec.stall_timeout_s
        self._max_jobs = self._engine.info.max_seqs + spec.max_queued
        # not asyncio's, of 6 threads on 2 cores: so many slow grammars would keep those waiting that are compiled already
        self._compiling = ThreadPoolExecutor(self._max_jobs, thread_name_prefix="grammar")
        self._engine.start(self._on_step)
        self._metrics = asyncio.ensure_future(self._report_metrics())
        info = self._engine.info
        log.info(
            "model %s ready in %.1f s: %s weights, %.0fM parameters, %s on %s, context %d tokens, KV pool %d tokens, "
            "%d sequences at once",
            info.model, time.monotonic() - began, info.source, info.parameters / 1e6, info.dtype, info.device,
            info.context_length, info.pool_tokens, info.max_seqs,
        )  # fmt: skip

    # ---- called through Serve --------------------------------------------------------------------------------------

    async def generate(self, request: Request, rid: int, reply_to: ReplyTo) -> Outcome:
        """Run one request; its events go to `reply_to` under the number `rid`. Returns when the last one was sent.

        Cancelling the call aborts the sequence.
        """
        try:
            link = await self._links.get(reply_to)
        except OSError as error:
            return ("lost", f"the model replica cannot reach the Api replica at {reply_to.host}:{reply_to.port}: "
                            f"{error}; transport: handle does without this connection")  # fmt: skip
        job = Job(self._loop.create_future(), link=link, rid=rid)
        refusal = await self._prepare(request) or self._submit(request, job)
        if refusal is not None:
            return refusal
        try:
            return await job.done
        finally:
            self._forget(request.request_id, job)

    async def stream(self, request: Request) -> AsyncGenerator[bytes | Outcome, None]:
        """The same over the call itself: packed lists of events, or one Outcome that says why there are none."""
        stream = Stream(request.request_id)
        job = Job(self._loop.create_future(), stream=stream)
        refusal = await self._prepare(request) or self._submit(request, job)
        if refusal is not None:
            yield refusal
            return
        try:
            while not stream.ended or stream.events:
                yield pack_events(await stream.take())
        finally:
            self._forget(request.request_id, job)

    async def info(self) -> EngineInfo:
        return self._engine.info

    async def stats(self) -> EngineStats:
        return replace(self._engine.stats(), engine=rank())

    async def dispatch_table(self) -> list[dict[str, Any]]:
        return self._engine.dispatch_table()

    def check_health(self) -> None:
        """Raises if the engine's thread has ended or hangs; Serve replaces the replica after three such answers."""
        if not self._engine.alive:
            raise RuntimeError(f"the engine thread has ended: {self._engine.failure or self._engine.stage}")
        age = self._engine.stats().last_step_age_s
        if age > self._stall_timeout_s:
            raise RuntimeError(f"the engine has made no progress for {age:.0f} s (limit stall_timeout_s = "
                               f"{self._stall_timeout_s:g}); it is {self._engine.stage}")  # fmt: skip

    def __del__(self) -> None:
        """Serve calls this at the end of a graceful stop, when no request is left or the time for them is over."""
        if not hasattr(self, "_metrics") or self._metrics.cancelled():
            return
        self._metrics.cancel()
        self._engine.shutdown()
        self._compiling.shutdown(wait=False, cancel_futures=True)
        self._links.close()

    # ---- between the engine's thread and the event loop ------------------------------------------------------------

    async def _prepare(self, request: Request) -> Outcome | None:
        """Compile a grammar while others are served."""
        if request.params.grammar is not None:
            try:
                await self._loop.run_in_executor(self._compiling, self._engine.prepare, request)
            except RequestError as error:
                if error.code == BUSY:  # the fault is not the request's
                    return ("overloaded", str(error))
                return ("refused", str(error), error.param, error.code)
        return None

    def _submit(self, request: Request, job: Job) -> Outcome | None:
        key = request.request_id
        if key in self._jobs:
            return ("refused", f"request_id {key!r} is in use", "request_id", "duplicate_request_id")
        if len(self._jobs) >= self._max_jobs:
            return ("overloaded", f"the model replica holds {len(self._jobs)} requests, its limit")
        self._jobs[key] = job  # before submit: the first event may come before submit returns
        try:
            self._engine.submit(request)
        except RequestError as error:
            del self._jobs[key]
            return ("refused", str(error), error.param, error.code)
        except EngineDead as error:
            del self._jobs[key]
            return ("lost", str(error))
        return None

    def _forget(self, request_id: str, job: Job) -> None:
        """The call is over: if the sequence is not, it ends now."""
        if self._jobs.get(request_id) is job:
            del self._jobs[request_id]
            self._engine.abort(request_id)

    def _on_step(self, events: list[TokenEvent]) -> None:
        """In the engine's thread: one wake-up of the loop per step, whatever the batch."""
        try:
            self._loop.call_soon_threadsafe(self._deliver, events)
        except RuntimeError:
            log.debug("%d events after the event loop closed", len(events))

    def _deliver(self, events: list[TokenEvent]) -> None:
        jobs = self._jobs
        links = set()
        for event in events:
            job = jobs.get(event.request_id)
            if job is None:
                continue
            if job.link is not None:
                job.link.add(job.rid, event)
                links.add(job.link)
            elif job.stream is not None:
                job.stream.add(event)
            if event.finish is not None:
                del jobs[event.request_id]
                job.end("done")
        for link in links:
            link.flush()

    def _on_lost(self, link: Link, reason: str) -> None:
        """An Api replica is gone: nobody will read what its requests make."""
        for request_id, job in [*self._jobs.items()]:
            if job.link is link:
                del self._jobs[request_id]
                self._engine.abort(request_id)
                job.end("lost", reason)

    async def _report_metrics(self) -> None:
        from deployments.metrics import EngineMetrics

        metrics = EngineMetrics(self._engine.info.model)
        while True:
            metrics.report(self._engine.stats())
            await asyncio.sleep(METRICS_PERIOD_S)
