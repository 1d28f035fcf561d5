"""Reading a JSON request body: bounded size, bounded nesting, strict JSON (RFC 8259), nothing lenient."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import orjson

from deployments.protocol.errors import ApiError, bad_request

MAX_DEPTH = 64  # no request of this API nests deeper than about ten; a JSON schema rarely beyond twenty
READ_TIMEOUT_S = 60.0  # for the whole body
DRAIN_FACTOR = 4  # of a body that is too large this many times the limit is still read, so the client sees the 413
DRAIN_TIMEOUT_S = 5.0

Receive = Callable[[], Awaitable[Any]]


class ClientGone(Exception):
    """Nobody is left to answer: the client closed the connection, or stopped reading. `code` is for the access log."""

    def __init__(self, code: str = "client_gone") -> None:
        super().__init__(code)
        self.code = code


async def read_json(headers: dict[bytes, bytes], receive: Receive, max_bytes: int) -> dict[str, Any]:
    """The request's JSON object. Raises ApiError 400, 408, 413 or 415, or ClientGone.

    headers: ASGI header pairs as a dict, names in lower case. max_bytes: limit of the body in bytes.
    """
    content_type = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if content_type != b"application/json":
        # also what keeps a web page from posting here without CORS: a "simple" request cannot carry this type
        got = content_type.decode("latin-1")[:100] or "none"
        raise ApiError(
            415,
            f"Unsupported content type: send 'content-type: application/json' (got: {got}).",
            code="unsupported_media_type",
        )
    encoding = headers.get(b"content-encoding", b"identity").strip().lower()
    if encoding != b"identity":  # a few bytes could unpack to gigabytes
        raise ApiError(
            415,
            f"Unsupported content encoding '{encoding.decode('latin-1')[:40]}': send the body uncompressed.",
            code="unsupported_media_type",
        )
    try:
        data = await asyncio.wait_for(_read(headers, receive, max_bytes), READ_TIMEOUT_S)
    except asyncio.TimeoutError:
        raise ApiError(
            408,
            f"The request body did not arrive within {READ_TIMEOUT_S:g} s.",
            type="timeout",
            code="request_timeout",
            headers={"connection": "close", "x-should-retry": "false"},
        ) from None
    return parse_object(data)


async def _read(headers: dict[bytes, bytes], receive: Receive, max_bytes: int) -> bytes:
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and int(declared) > max_bytes:
        await _drain(receive, 0, max_bytes)
        raise _too_large(max_bytes)
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part, more = message.get("body", b""), message.get("more_body", False)
        size += len(part)
        if size > max_bytes:
            parts.clear()
            if more:
                await _drain(receive, size, max_bytes)
            raise _too_large(max_bytes)
        parts.append(part)
        if not more:
            return b"".join(parts)


async def _drain(receive: Receive, read: int, max_bytes: int) -> None:
    """Reads on for a bounded while: closing on unread data resets the connection and the client never sees the 413."""

    async def drain() -> None:
        nonlocal read
        while read < DRAIN_FACTOR * max_bytes:
            message = await receive()
            read += len(message.get("body", b""))
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                return

    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(drain(), DRAIN_TIMEOUT_S)


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"The request body is larger than this server's limit of {max_bytes} bytes.",
        code="request_too_large",
        headers={"connection": "close"},
    )


def parse_object(data: bytes) -> dict[str, Any]:
    """A strict JSON object (no NaN, Infinity, lone surrogate or number beyond float64), at most MAX_DEPTH deep.

    Raises ApiError 400 `invalid_json` with the position, or `invalid_type`.
    """
    try:
        value = orjson.loads(data)  # its own nesting limit is 1024, so that hostile input cannot exhaust the stack
    except orjson.JSONDecodeError as error:
        raise bad_request(
            f"We could not parse the JSON body of your request: {error}. "
            "(HINT: the body must be valid JSON in UTF-8, without NaN, Infinity or lone surrogates.)",
            code="invalid_json",
        ) from None
    if type(value) is not dict:
        raise bad_request("The body of the request must be a JSON object.", code="invalid_type")
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for container in level:
            items = container.values() if type(container) is dict else container
            below.extend(item for item in items if type(item) in (dict, list))
        if not below:
            return value
        level = below
    raise bad_request(f"The JSON body is nested deeper than {MAX_DEPTH} levels.", code="invalid_json")
