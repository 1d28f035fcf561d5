"""A model replica and Api-side transports on one event loop: the real classes, joined by a stand-in for Serve's handle."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from benchmarks.fake_engine import FakeEngine
from deployments.replica import ModelReplica, ReplicaSpec
from deployments.transport.handle import HandleTransport
from deployments.transport.push import PushTransport
from model_core.engine.config import EngineConfig
from model_core.engine.request import Request, SamplingParams, TokenEvent
from model_core.weights.source import LocalModel, ModelSource


class Call:
    """What `handle.method.remote()` returns: awaitable, cancellable, and broken when the replica dies."""

    def __init__(self, work: Coroutine[Any, Any, Any], death: asyncio.Future[None]) -> None:
        self._task = asyncio.ensure_future(self._run(work, death))
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody has to ask for it

    async def _run(self, work: Coroutine[Any, Any, Any], death: asyncio.Future[None]) -> Any:
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task, death}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise ActorDiedError
        finally:
            task.cancel()

    def __await__(self) -> Any:
        return self._task.__await__()

    def cancel(self) -> None:
        self._task.cancel()


class StreamCall:
    """The same for `options(stream=True)`."""

    def __init__(self, items: Any, death: asyncio.Future[None]) -> None:
        self._items, self._death = items, death
        self._next: Call | None = None

    async def __anext__(self) -> Any:
        self._next = Call(self._items.__anext__(), self._death)
        return await self._next

    def cancel(self) -> None:
        assert self._next is not None
        self._next.cancel()
        asyncio.ensure_future(self._close())

    async def _close(self) -> None:
        await asyncio.sleep(0.001)
        await self._items.aclose()


class Method:
    def __init__(self, handle: Handle, name: str) -> None:
        self._handle, self._name = handle, name

    def remote(self, *args: Any) -> Any:
        result = getattr(self._handle.replica, self._name)(*args)
        if hasattr(result, "__anext__"):
            return StreamCall(result, self._handle.death)
        return Call(result, self._handle.death)


class Handle:
    """Stands for ray.serve.handle.DeploymentHandle of one model replica."""

    def __init__(self, replica: ModelReplica) -> None:
        self.replica = replica
        self.death: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def __getattr__(self, name: str) -> Method:
        return Method(self, name)

    def options(self, stream: bool) -> Handle:
        assert stream
        return self

    def broadcast(self, name: str) -> Any:
        class Broadcast:
            async def results_async(this, timeout_s: float, return_exceptions: bool) -> list[Any]:
                return [await Method(self, name).remote()]

        return Broadcast()

    def die(self) -> None:
        """As a killed process: calls fail, sockets break, no abort reaches the engine from outside."""
        for link in [*self.replica._links._links.values()]:
            link._transport.abort()
        self.death.set_result(None)


@dataclass
class World:
    """One model replica and the transports made over it."""

    engine: FakeEngine
    replica: ModelReplica
    handle: Handle
    transports: list[Any] = field(default_factory=list)

    async def transport(self, kind: str = "push", wait: bool = True) -> Any:
        made = PushTransport(self.handle, "127.0.0.1") if kind == "push" else HandleTransport(self.handle)
        self.transports.append(made)
        await made.start()
        if wait:
            await until(lambda: made._info is not None)
        return made

    async def quiet(self) -> None:
        """Nothing of any request is left anywhere."""
        await until(lambda: not self.engine._live and not self.replica._jobs)
        for made in self.transports:
            await until(lambda made=made: not getattr(made, "_streams", None) and not getattr(made, "_tasks", None))


async def until(condition: Callable[[], bool]) -> None:
    end = asyncio.get_running_loop().time() + 5.0
    while not condition():
        assert asyncio.get_running_loop().time() < end, "waited in vain"
        await asyncio.sleep(0.001)


def make_spec(max_queued: int = 1000, stall_timeout_s: float = 5.0) -> ReplicaSpec:
    local = LocalModel(Path("nowhere"), "fake", "disk")
    return ReplicaSpec(local, ModelSource("fake"), "nowhere", EngineConfig(), "fake", max_queued, stall_timeout_s)


@asynccontextmanager
async def open_world(*, step_s: float = 0.002, max_seqs: int = 512, **spec: Any) -> AsyncIterator[World]:
    engine = FakeEngine(list(range(100, 400)), step_s=step_s, max_seqs=max_seqs)
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    replica = ModelReplica.__new__(ModelReplica)
    await replica.__init__(make_spec(**spec), lambda _: engine)  # type: ignore[misc]
    world = World(engine, replica, Handle(replica))
    try:
        yield world
    finally:
        for made in world.transports:
            await made.close()
        replica.__del__()
        await asyncio.sleep(0.01)
        gc.collect()
        assert not complaints  # no exception that nobody saw


def make_request(name: str, tokens: int = 10, **params: Any) -> Request:
    return Request(name, [1, 2, 3], SamplingParams(max_tokens=tokens, **params))


async def read(transport: Any, request: Request) -> list[TokenEvent]:
    events = []
    async for batch in transport.generate(request):
        assert batch
        events += batch
    return events


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """A replica sends our log to stderr; other tests of this process want it where it was."""
    logger = logging.getLogger("mini_llm")
    before = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate, logger.level = before


@pytest.fixture
def tools() -> Any:
    """The helpers above, for test modules that pytest imports by path."""

    class Tools:
        world = staticmethod(open_world)
        request = staticmethod(make_request)
        read = staticmethod(read)
        until = staticmethod(until)
        spec = staticmethod(make_spec)

    return Tools
