"""The layer in front of Ray Serve's own HTTP code: what Serve and uvicorn would say in bare text leaves in our envelope.

Serve puts `middlewares` into the server of every HTTP replica and of its Python proxies, by the environment variable
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH (serve_config.yaml). HAProxy's answers are not in its reach: see haproxy.py.
"""

from __future__ import annotations

import math
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from deployments.error_page import page
from deployments.protocol.anthropic_events import error_body
from deployments.protocol.errors import (
    GOOD_ID,
    ApiError,
    bad_request,
    internal_error,
    replica_lost,
    timed_out,
    unavailable,
    unknown_url,
)

_SERVES_TIMEOUT, _OUR_TIMEOUT = b"x-request-timeout-seconds", b"x-request-timeout"


def middlewares() -> list[Middleware]:
    """Serve calls this once in each process, before its server starts."""
    for protocol in (H11Protocol, HttpToolsProtocol):
        protocol.send_400_response = _refuse_noise  # type: ignore
    return [Middleware(Front)]


class Front:
    """ASGI middleware around Serve's app."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if scope["type"] == "websocket":
            await receive()
            error = bad_request("This server speaks no WebSocket: send an HTTP request.", code="websocket_unsupported")
            await _send(error, path, [], send, "websocket.http.response")
            return
        if scope["type"] != "http" or path.startswith("/-/"):  # Serve's own probes
            await self._app(scope, receive, send)
            return
        _tidy(scope)
        _take_deadline(scope)
        held: Message | None = None
        started = False

        async def translate(message: Message) -> None:
            nonlocal held, started
            if message["type"] == "http.response.start" and message["status"] >= 400 and not _is_json(message):
                held = message
            elif held is None:
                started = True
                await send(message)
            elif not message.get("more_body", False):
                started = True
                await _send(_in_our_words(held["status"], path), path, held["headers"], send)

        try:
            await self._app(scope, receive, translate)
        except Exception:
            if started:
                raise  # the server must cut the answer, so that it cannot look complete
        if not started:  # Serve's proxy says nothing when the replica behind it ends: uvicorn would, in bare text
            # Serve has put its request id among the request's headers
            request_id = [pair for pair in scope["headers"] if pair[0] == b"x-request-id"]
            await _send(replica_lost(started=False), path, request_id, send)


def _tidy(scope: Scope) -> None:
    """Serve sends back whatever request id it is given, reads it and others as UTF-8, and fails where they are none: what it
    cannot read goes, and so does an id that is not a good one. Serve makes another."""
    scope["headers"] = [
        (name, value)
        for name, value in scope["headers"]
        if (GOOD_ID.fullmatch(value) if name == b"x-request-id" else value.isascii() or _is_utf8(value))
    ]


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _take_deadline(scope: Scope) -> None:
    """Serve's header becomes the API's own: past it Serve would answer in bare text and cut a stream.

    As Serve reads it, what is not above 0 or no number means no deadline.
    """
    given = dict(scope["headers"])
    value = given.get(_SERVES_TIMEOUT)
    if value is None:
        return
    rest = [(name, text) for name, text in scope["headers"] if name != _SERVES_TIMEOUT]
    try:
        is_deadline = 0 < float(value) < math.inf
    except ValueError:
        is_deadline = False
    if is_deadline and _OUR_TIMEOUT not in given:
        rest.append((_OUR_TIMEOUT, value))
    scope["headers"] = rest


def _is_json(start: Message) -> bool:
    return any(name.lower() == b"content-type" and value.startswith(b"application/json") for name, value in start["headers"])


def _in_our_words(status: int, path: str) -> ApiError:
    """For an error of Serve's proxies or replicas."""
    if status == 404:
        return unknown_url(f"No application is served at {path[:200]}; it may be starting.")
    if status == 408:
        return timed_out("Ray Serve's deadline (http_options.request_timeout_s)", started=False)
    if status in (429, 503):
        return unavailable("Ray Serve has no replica for this request now. Please try again.", "no_replica", 5)
    error = internal_error()
    error.status = status
    return error


async def _send(error: ApiError, path: str, headers: Any, send: Send, kind: str = "http.response") -> None:
    """headers: of the answer that this one replaces; its request id and such are kept."""
    kept = [(name.lower(), value) for name, value in headers if name.lower() not in (b"content-type", b"content-length")]
    request_id = dict(kept).get(b"x-request-id", b"").decode("latin-1")
    body = error_body(error, path, request_id)
    own = [(name.encode(), value.encode()) for name, value in error.headers.items()]
    own += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    named = {name for name, _ in own}
    kept = [pair for pair in kept if pair[0] not in named]
    await send({"type": f"{kind}.start", "status": error.status, "headers": [*kept, *own]})
    await send({"type": f"{kind}.body", "body": body})


def _refuse_noise(protocol: Any, text: str) -> None:
    """In place of uvicorn's answer to what is no HTTP, for which it has no setting. text: its own words, ASCII."""
    error = bad_request(f"{text} Expected HTTP/1.1 with one of its methods.", code="invalid_http")
    error.headers["connection"] = "close"
    protocol.transport.write(page(error))
    protocol.transport.close()
