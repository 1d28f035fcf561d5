"""The `push` transport, Api side: one unary Serve call per request as control, tokens by frames on our own socket.

The call stays open until the sequence has ended, so routing, limits, draining, cancellation and the death of a replica
are Serve's business, by public API only. The tokens do not pass through Serve: streaming per token through it costs the
engine's process 80 us a token even with all throughput flags, a frame per step 1 to 3 us (200 streams, 2 cores).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import AsyncGenerator
from typing import Any

from deployments.transport.base import Overloaded, ReplicaLost
from deployments.transport.client import ModelClient, failure
from deployments.transport.sender import ReplyTo
from deployments.transport.stream import Stream
from deployments.transport.wire import FrameProtocol, WireError, decode_event
from model_core.engine.request import Request, TokenEvent
from model_core.errors import RequestError

log = logging.getLogger("mini_llm.transport")

LAST_FRAME_WAIT_S = 1.0  # the call's result may overtake the last frame; later than this it is not coming


class PushTransport(ModelClient):
    """See base.Transport. model: handle of the model deployment. host: where to listen; None is 127.0.0.1 while the
    cluster is one node, else this node's address."""

    def __init__(self, model: Any, host: str | None = None) -> None:
        super().__init__(model)
        self._host = host
        self._secret = secrets.token_bytes(32)
        self._server: asyncio.Server | None = None
        self._reply_to: ReplyTo | None = None
        self._rids = itertools.count()
        self._streams: dict[int, Stream] = {}
        self._links: set[FrameProtocol] = set()
        self._tasks: set[asyncio.Future[Any]] = set()

    async def start(self) -> None:
        host = self._host or _listening_address()
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._protocol, host, 0)
        self._reply_to = ReplyTo(host, self._server.sockets[0].getsockname()[1], self._secret)
        await super().start()

    async def close(self) -> None:
        await super().close()
        for stream in [*self._streams.values()]:
            stream.fail(ReplicaLost("this Api replica is closing"))
        if self._server is not None:
            self._server.close()
        for link in [*self._links]:
            if link.transport is not None:
                link.transport.abort()
        for task in [*self._tasks]:
            task.cancel()

    async def generate(self, request: Request) -> AsyncGenerator[list[TokenEvent], None]:
        await self.info()  # NotReady, before anything is started
        assert self._reply_to is not None, "start() comes first"
        rid = next(self._rids)
        stream = self._streams[rid] = Stream(request.request_id)
        call = self._model.generate.remote(request, rid, self._reply_to)
        watching = asyncio.ensure_future(self._watch(stream, call))
        self._tasks.add(watching)
        watching.add_done_callback(self._tasks.discard)
        try:
            while True:
                events = await stream.take()
                yield events
                if events[-1].finish is not None:
                    return
        finally:
            del self._streams[rid]
            if not stream.ended:  # else the call is about to return by itself
                watching.cancel()
                call.cancel()

    async def _watch(self, stream: Stream, call: Any) -> None:
        """The call's result is the safety net; the events are what counts."""
        try:
            outcome, *details = await call
        except asyncio.CancelledError:
            raise
        except Exception as error:
            stream.fail(failure(error))
            return
        if outcome == "refused":
            message, param, code = details
            stream.fail(RequestError(message, param=param, code=code))
        elif outcome == "overloaded":
            stream.fail(Overloaded(*details))
        elif outcome == "lost":
            stream.fail(ReplicaLost(*details))
        elif not stream.ended:
            await asyncio.sleep(LAST_FRAME_WAIT_S)
            stream.fail(ReplicaLost("the sequence ended, but its last tokens did not arrive"))

    # ---- the socket ------------------------------------------------------------------------------------------------

    def _protocol(self) -> FrameProtocol:
        return FrameProtocol(self._secret, self._links.add, self._on_frame, self._on_close)

    def _on_frame(self, link: FrameProtocol, events: list[Any]) -> None:
        streams = self._streams
        try:
            for rid, ids, finish, extra in events:
                stream = streams.get(rid)
                if stream is None or stream.error is not None:
                    continue  # its reader has left; the abort is on its way
                if stream.link is not link:
                    if stream.link is not None:
                        raise WireError(f"tokens of request {rid} come over two connections")
                    stream.link = link
                if stream.ended:
                    raise WireError(f"tokens of request {rid} come after its end")
                stream.add(decode_event(stream.request_id, ids, finish, extra))
        except (TypeError, ValueError) as error:
            raise WireError(f"not a list of events: {error}") from None

    def _on_close(self, link: FrameProtocol, error: Exception | None) -> None:
        self._links.discard(link)
        if error is not None:
            log.warning("lost a model replica's token connection: %s", error)
        for stream in [*self._streams.values()]:
            if stream.link is link:
                stream.fail(ReplicaLost("the connection to the model replica broke"))


def _listening_address() -> str:
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    return "127.0.0.1" if len(nodes) == 1 else ray.util.get_node_ip_address()
