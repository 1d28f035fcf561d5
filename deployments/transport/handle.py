"""The `handle` transport: plain Serve streaming, one generator call per request.

Nothing but Serve's public streaming API: the twin that `push` is tested against, and what to fall back on where no
connection from the model's node to the Api's node is allowed. It costs the engine's process about 80 us per token.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import suppress

from deployments.transport.base import Overloaded, ReplicaLost
from deployments.transport.client import ModelClient, failure
from deployments.transport.wire import WireError, unpack_events
from model_core.engine.request import Request, TokenEvent
from model_core.errors import RequestError


class HandleTransport(ModelClient):
    """See base.Transport."""

    async def generate(self, request: Request) -> AsyncGenerator[list[TokenEvent], None]:
        await self.info()
        call = self._model.options(stream=True).stream.remote(request)
        ended = False
        try:
            while not ended:
                try:
                    item = await call.__anext__()
                except StopAsyncIteration:
                    raise ReplicaLost("the stream ended before its last token") from None
                except Exception as error:
                    raise failure(error) from None
                if isinstance(item, tuple):
                    raise _refusal(item)
                try:
                    events = unpack_events(request.request_id, item)
                except WireError as error:
                    raise ReplicaLost(str(error)) from None
                ended = events[-1].finish is not None
                yield events
            # the generator's end, not only its last item: else Serve counts the request as cancelled
            with suppress(StopAsyncIteration):
                await call.__anext__()
        finally:
            if not ended:
                call.cancel()


def _refusal(item: tuple) -> Exception:
    outcome, *details = item
    if outcome == "refused":
        message, param, code = details
        return RequestError(message, param=param, code=code)
    return Overloaded(*details) if outcome == "overloaded" else ReplicaLost(*details)
