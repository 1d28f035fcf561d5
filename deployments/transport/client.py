"""What both transports do alike on the Api side: ask the model replicas about themselves, and read their failures."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from deployments.broadcast import answers_of
from deployments.transport.base import NotReady, Overloaded, ReplicaLost
from model_core.engine.request import EngineInfo, EngineStats
from model_core.errors import MiniLLMError

log = logging.getLogger("mini_llm.transport")

STATS_TTL_S = 0.5  # a broadcast costs a call per replica; an overloaded gate asks once per refused request
RETRY_S = 0.5


class ModelClient:
    """model: the handle of the model deployment, whose methods are those of deployments.replica.ModelReplica."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._info: EngineInfo | None = None
        self._probing: asyncio.Task[None] | None = None
        self._stats: list[EngineStats] = []
        self._stats_at = -STATS_TTL_S
        self._asking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._probing = asyncio.ensure_future(self._probe())

    async def close(self) -> None:
        for task in (self._probing, self._asking):
            if task is not None:
                task.cancel()

    async def info(self) -> EngineInfo:
        """Raises NotReady until a model replica has answered; it is asked from start() on, in the background."""
        if self._info is None:
            raise NotReady("no model replica has answered yet")
        return self._info

    async def stats(self) -> list[EngineStats]:
        """One reading per model replica that answers in 1.5 s, at most 0.5 s old. Raises NotReady before start-up."""
        await self.info()
        if time.monotonic() - self._stats_at > STATS_TTL_S:
            if self._asking is None:
                self._asking = asyncio.ensure_future(self._ask())
            await asyncio.shield(self._asking)
        return self._stats

    async def dispatch_table(self) -> list[dict[str, Any]]:
        await self.info()
        try:
            return await self._model.dispatch_table.remote()
        except (RayError, RayServeException) as error:
            raise NotReady(str(failure(error))) from None

    async def _probe(self) -> None:
        while self._info is None:
            try:
                self._info = await self._model.info.remote()
            except Exception as error:  # whatever it is, the replica may yet come up
                log.info("no model replica yet: %s", type(error).__name__)
                await asyncio.sleep(RETRY_S)

    async def _ask(self) -> None:
        try:
            self._stats = await answers_of(self._model, "stats", EngineStats)
        finally:
            self._asking = None
        self._stats_at = time.monotonic()


def failure(error: BaseException) -> MiniLLMError:
    """What an exception of a Serve call means for the request that made it."""
    if isinstance(error, BackPressureError):
        return Overloaded("the queue of the model deployment is full")
    if isinstance(error, DeploymentUnavailableError):
        return NotReady("the model deployment has no replica")
    if isinstance(error, RayActorError):  # ActorDiedError, or ActorUnavailableError where calls go over gRPC
        return ReplicaLost("the model replica died")
    return ReplicaLost(f"the call to the model replica failed: {type(error).__name__}: {str(error)[:300]}")
