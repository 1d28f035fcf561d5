"""One JSON line per request on `mini_llm.access`, in whatever way it ends, under the id that the client was told."""

from __future__ import annotations

import json
import logging
import socket
import time

import pytest

from deployments.protocol.access import Access, ApiKey
from model_core.errors import EngineDead
from tests.waiting import wait_until

MESSAGES = [{"role": "user", "content": "my secret"}]
KEY = {"authorization": "Bearer sk-a"}
CHAT = "/v1/chat/completions"


@pytest.fixture
def guarded(fresh_server):
    keys = [ApiKey(name="a", key="sk-a"), ApiKey(name="b", key="sk-b", requests_per_minute=1)]
    server = fresh_server(access=Access(keys=keys))
    server.fake.script, server.fake.delay = lambda request: [97] * 200, 0.005
    return server


class Lines:
    """The lines so far, by request id."""

    def __init__(self, caplog):
        self._caplog = caplog

    def of(self, request_id: str) -> list[dict]:
        records = [record for record in self._caplog.records if record.name == "mini_llm.access"]
        return [line for record in records if (line := json.loads(record.getMessage()))["id"] == request_id]

    def wait_for(self, request_id: str) -> dict:
        wait_until(lambda: self.of(request_id))
        time.sleep(0.05)  # a second one would come now
        [line] = self.of(request_id)
        return line


@pytest.fixture
def lines(caplog):
    with caplog.at_level(logging.INFO, "mini_llm.access"):
        yield Lines(caplog)
    assert "secret" not in caplog.text


def body(**fields) -> bytes:
    return json.dumps({"messages": MESSAGES, "max_tokens": 3, **fields}).encode()


ENDINGS = {  # request → status and error of its line
    "whole": (CHAT, body(), KEY, 200, None),
    "streamed": (CHAT, body(stream=True), KEY, 200, None),
    "anthropic's": ("/v1/messages", body(model="acme/tiny"), KEY, 200, None),
    "no key": (CHAT, body(), {}, 401, "invalid_api_key"),
    "malformed body": (CHAT, b'{"messages": my secret', KEY, 400, "invalid_json"),
    "bad field": (CHAT, body(temperature=9), KEY, 400, "decimal_above_max_value"),
    "too large": (CHAT, b" " * 20_001, KEY, 413, "request_too_large"),
    "content type": (CHAT, body(), {**KEY, "content-type": "text/plain"}, 415, "unsupported_media_type"),
    "no such model": (CHAT, body(model="x"), KEY, 404, "model_not_found"),
    "unknown path": ("/v1/nothing", body(), KEY, 404, "unknown_url"),
    "wrong method": ("/v1/models", body(), KEY, 405, "method_not_allowed"),
    "deadline": (CHAT, body(max_tokens=200), {**KEY, "x-request-timeout": "0.1"}, 504, "deadline_exceeded"),
    "deadline of a stream": (CHAT, body(max_tokens=200, stream=True), {**KEY, "x-request-timeout": "0.1"}, 200,
                             "deadline_exceeded"),
}  # fmt: skip


@pytest.mark.parametrize("how", list(ENDINGS))
def test_answers_and_refusals(guarded, lines, how):
    path, data, headers, status, error = ENDINGS[how]
    given = {"content-type": "application/json", **headers}
    found, told, _ = guarded.raw("POST", path, data, given)
    line = lines.wait_for(told["x-request-id"])
    assert found == line["status"] == status and line.get("error") == error
    assert line["key" if headers else "id"] and line["total_ms"] > 0 and line["method"] == "POST"


def test_a_spent_allowance(guarded, lines):
    headers = {"content-type": "application/json", "authorization": "Bearer sk-b"}
    told = [guarded.raw("POST", CHAT, body(), headers)[1]["x-request-id"] for _ in range(2)]
    good, spent = map(lines.wait_for, told)
    assert (good["status"], good["key"]) == (200, "b")
    assert (spent["status"], spent["error"], spent["key"]) == (429, "rate_limit_exceeded", "b")


@pytest.mark.parametrize("when", ["in the body", "before a token", "in the stream", "of a whole answer"])
def test_a_client_that_leaves(guarded, lines, when):
    data = body(stream=when != "of a whole answer", max_tokens=200)
    if when == "before a token":
        guarded.fake.first_delay = 30
    head = f"POST {CHAT} HTTP/1.1\r\nhost: a\r\nx-request-id: gone\r\nauthorization: Bearer sk-a\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", guarded.port), 10) as connection:
        connection.sendall(head.encode() + data[: 9 if when == "in the body" else None])
        end = time.monotonic() + (0.1 if when == "in the body" else 5)
        while time.monotonic() < end and not (guarded.fake.running if when == "before a token" else guarded.fake.produced > 3):
            time.sleep(0.002)
    line = lines.wait_for("gone")
    assert (line["status"], line["error"]) == (499, "client_gone")
    assert (line.get("completion_tokens", 0) > 0) == (when in ("in the stream", "of a whole answer"))


@pytest.mark.parametrize(("failure", "status", "error"), [
    (EngineDead("my secret"), 503, "replica_lost"), (OSError("bug"), 500, "server_error"),
])  # fmt: skip
def test_a_failure_of_the_engine(guarded, lines, failure, status, error):
    guarded.fake.failure = failure
    told = guarded.raw("POST", CHAT, body(), {**KEY, "content-type": "application/json"})[1]
    line = lines.wait_for(told["x-request-id"])
    assert (line["status"], line["error"], line["finish"]) == (status, error, "error")
