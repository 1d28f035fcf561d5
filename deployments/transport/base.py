"""What the HTTP side needs of a token transport, whatever carries the tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Protocol

from model_core.engine.request import EngineInfo, EngineStats, Request, TokenEvent
from model_core.errors import MiniLLMError


class NotReady(MiniLLMError):
    """No model replica has answered yet: weights are loading, or the replica is being replaced."""


class ReplicaLost(MiniLLMError):
    """The replica that served this request died, or its connection broke; its sequence is gone."""


class Overloaded(MiniLLMError):
    """The replica's queue is full; nothing was started."""


class Transport(Protocol):
    """The ingress' side. Everything runs on one event loop; no method blocks it."""

    async def start(self) -> None:
        """Called once, before anything else."""

    async def close(self) -> None:
        """Ends every open stream with ReplicaLost."""

    async def info(self) -> EngineInfo:
        """The served model. Raises NotReady until a model replica answers."""
        ...

    async def stats(self) -> list[EngineStats]:
        """One reading per live model replica."""
        ...

    async def dispatch_table(self) -> list[dict[str, Any]]:
        """Which kernel runs for which op and shape, as JSON rows. Raises NotReady."""
        ...

    def generate(self, request: Request) -> AsyncGenerator[list[TokenEvent], None]:
        """Non-empty lists of the request's events in order, all that have arrived; the last event has `finish` set.

        Closing the generator (aclose, or cancellation of the task that waits in it) aborts the sequence. Raises
        RequestError for a request the engine refuses, Overloaded, NotReady, ReplicaLost.
        """
        ...
