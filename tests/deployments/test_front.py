"""The layer in front of Ray Serve: what passes, what is put into our envelope, and Serve's deadline header."""

from __future__ import annotations

import asyncio
import json

import pytest

from deployments.front import Front

JSON = [(b"content-type", b"application/json")]
TEXT = [(b"content-type", b"text/plain"), (b"content-length", b"9"), (b"X-Request-ID", b"r1")]


def serve_says(status: int, headers, *parts: bytes):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": part is not parts[-1]})

    return app


def call(app, path: str = "/v1/completions", headers=(), kind: str = "http") -> tuple[list[dict], dict]:
    """The messages that reach the server, and the scope afterwards."""
    sent: list[dict] = []
    scope = {"type": kind, "path": path, "headers": list(headers)}

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": f"{kind}.connect"}

    asyncio.run(Front(app)(scope, receive, send))
    return sent, scope


@pytest.mark.parametrize(("status", "code"), [
    (404, "unknown_url"), (408, "request_timeout"), (429, "no_replica"), (503, "no_replica"), (500, None), (502, None),
])  # fmt: skip
def test_bare_text_becomes_an_envelope_of_the_same_class(status, code):
    (start, body), _ = call(serve_says(status, TEXT, b"some", b" text"))
    error = json.loads(body["body"])["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["code"] == code
    assert start["status"] == (503 if status == 429 else status)
    headers = dict(start["headers"])
    assert headers[b"content-type"] == b"application/json" and headers[b"x-request-id"] == b"r1"
    assert int(headers[b"content-length"]) == len(body["body"]) and len(headers) == len(start["headers"])
    assert (b"retry-after" in headers) == (start["status"] == 503)


def test_at_anthropics_routes_it_is_anthropics_envelope():
    (_, body), _ = call(serve_says(503, TEXT, b"text"), "/v1/messages")
    told = json.loads(body["body"])
    assert told["type"] == "error" and told["request_id"] == "r1"


@pytest.mark.parametrize(("path", "status", "headers"), [
    ("/v1/completions", 400, JSON), ("/metrics", 200, TEXT), ("/-/healthz", 503, TEXT),
])  # fmt: skip
def test_our_own_answers_and_serves_probes_pass_as_they_are(path, status, headers):
    app = serve_says(status, headers, b"a", b"b")
    sent, _ = call(app, path)
    alone: list[dict] = []

    async def keep(message):
        alone.append(message)

    asyncio.run(app({}, None, keep))
    assert sent == alone


async def silent(scope, receive, send):
    scope["headers"] = [*scope["headers"], (b"x-request-id", b"r2")]


async def broken(scope, receive, send):
    raise RuntimeError("secret")


async def cut(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": JSON})
    raise RuntimeError("secret")


async def cancelled(scope, receive, send):
    raise asyncio.CancelledError


def test_no_answer_at_all_is_a_lost_replica_but_a_cut_one_stays_cut():
    for app in (silent, broken):
        (start, body), _ = call(app)
        assert start["status"] == 503 and json.loads(body["body"])["error"]["code"] == "replica_lost"
        assert (b"x-request-id", b"r2") in start["headers"] or app is broken
    with pytest.raises(RuntimeError):
        call(cut)
    with pytest.raises(asyncio.CancelledError):
        call(cancelled)


@pytest.mark.parametrize(("given", "kept"), [
    ({"x-request-timeout-seconds": "1.5"}, {"x-request-timeout": "1.5"}),
    ({"x-request-timeout-seconds": "0"}, {}), ({"x-request-timeout-seconds": "-1"}, {}),
    ({"x-request-timeout-seconds": "soon"}, {}), ({"x-request-timeout-seconds": "inf"}, {}),
    ({"x-request-timeout-seconds": "1", "x-request-timeout": "x"}, {"x-request-timeout": "x"}),
    ({"x-other": "1"}, {"x-other": "1"}),
])  # fmt: skip
def test_serves_deadline_becomes_our_own(given, kept):
    headers = [(name.encode(), value.encode()) for name, value in given.items()]
    _, scope = call(serve_says(200, JSON, b"{}"), headers=headers)
    assert {name.decode(): value.decode() for name, value in scope["headers"]} == kept


@pytest.mark.parametrize(("given", "kept"), [
    ([b"mine-1"], [b"mine-1"]), ([b"a b"], []), ([b""], []), ([b"x" * 129], []), ([b"\xe9"], []), ([b"\xff", b"b"], [b"b"]),
])  # fmt: skip
def test_serve_gets_good_request_ids_only_and_nothing_that_is_not_utf8(given, kept):
    headers = [(b"x-session-id", b"\xe9\xff"), (b"x-name", "é".encode()), *((b"x-request-id", value) for value in given)]
    _, scope = call(serve_says(200, JSON, b"{}"), headers=headers)
    assert scope["headers"] == [(b"x-name", "é".encode()), *((b"x-request-id", value) for value in kept)]


def test_a_websocket_is_refused_in_words():
    (start, body), _ = call(silent, kind="websocket")
    assert (start["type"], start["status"]) == ("websocket.http.response.start", 400)
    assert json.loads(body["body"])["error"]["code"] == "websocket_unsupported"
