"""The outermost layer of the app: request ids, one access record per request, and no exception without an envelope."""

from __future__ import annotations

import asyncio
import logging
import uuid

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.api.metrics import Metrics
from deployments.api.record import Record
from deployments.api.tracing import Tracer
from deployments.protocol.anthropic_events import error_body
from deployments.protocol.body import ClientGone
from deployments.protocol.errors import GOOD_ID, ApiError, internal_error, unknown_url

log = logging.getLogger("mini_llm.api")

_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}


class Edge:
    """ASGI middleware. tag_responses: send x-request-id (off under Ray Serve, whose proxies add it themselves).

    scope["mini_llm.record"] is the request's Record; scope["mini_llm.send"] the server's own send.
    """

    def __init__(
        self, app: ASGIApp, *, metrics: Metrics, routes: frozenset[str], tag_responses: bool, tracer: Tracer | None
    ) -> None:
        self._app = app
        self._tracer = tracer
        self._metrics = metrics
        self._routes = routes
        self._tag_responses = tag_responses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = given if GOOD_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # of an application with a route_prefix
        # unknown paths share one label: a scanner must not create a time series per guess
        route = path if path in self._routes else "/v1/models/{id}" if path.startswith(("/v1/models/", "/models/")) else "other"
        record = Record(request_id.decode(), scope["method"], route)
        scope["mini_llm.record"] = record
        scope["mini_llm.send"] = send

        async def send_start(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                tags = [(b"x-request-id", request_id)] if self._tag_responses else []
                if route.startswith("/v1/messages"):  # Anthropic's clients read this name
                    tags.append((b"request-id", request_id))
                message["headers"] = [*message.get("headers", ()), *tags]
            await send(message)

        try:
            await self._app(scope, receive, send_start)
        except (ClientGone, asyncio.CancelledError) as gone:
            record.status = 499
            record.error = gone.code if isinstance(gone, ClientGone) else "client_gone"
            if isinstance(gone, asyncio.CancelledError):
                raise
        except Exception:
            log.exception("request %s failed", record.id)
            if record.status:
                raise  # the response has begun: the server must cut it, so that it cannot look complete
            await refuse(internal_error(), scope, receive, send_start)
        finally:
            del scope["mini_llm.send"]  # it leads back to the scope: else 60 objects a request wait for the garbage collector
            method = record.method if record.method in _METHODS else "other"
            self._metrics.count_http(method, route, record.status, record.seconds())
            if record.status in (429, 503) and record.error is not None:  # not what /ready says
                self._metrics.rejected[record.error] += 1
            record.write()
            if self._tracer is not None:
                self._tracer.write(record, scope)


def error_response(error: ApiError, scope: Scope) -> Response:
    """Every error that is not an event of a stream leaves through here."""
    record = scope["mini_llm.record"]
    record.error = error.code or error.type
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return Response(error_body(error, path, record.id), error.status, error.headers, "application/json")


async def refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """For layers outside the one that turns exceptions into answers."""
    await error_response(error, scope)(scope, receive, send)


async def on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error, request.scope)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405 in our envelope."""
    assert isinstance(error, HTTPException)
    headers = {name.lower(): value for name, value in (error.headers or {}).items()}
    if error.status_code == 405:
        message = f"Method {request.method[:20]} is not allowed here. Allowed: {headers.get('allow', '')}."
        return await on_api_error(request, ApiError(405, message, code="method_not_allowed", headers=headers))
    root = request.scope.get("root_path", "")
    message = f"Unknown URL: {request.method[:20]} {request.scope['path'][:200]}. GET {root}/ lists what is served."
    return await on_api_error(request, unknown_url(message))
