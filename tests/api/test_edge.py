"""Every refusal of the edge (api.md, section 3) in one table: status, envelope, headers, request id, access log."""

import asyncio
import gc
import json
import logging
import re
import socket
import time

import pytest

from deployments.api.job import Job
from deployments.protocol import body as body_module
from deployments.transport.base import NotReady, Overloaded, ReplicaLost
from model_core.errors import EngineDead
from tests.api.conftest import endless
from tests.waiting import wait_until

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "hi"}]}
JSON = {"content-type": "application/json"}


def late(server, **limits):
    server.fake.first_delay = 30
    for name, value in limits.items():
        setattr(server.limits, name, value)


def pausing(server):
    server.fake.script, server.fake.delay, server.limits.idle_timeout_s = endless, 30, 0.05


def slow(server):
    server.fake.script, server.fake.delay, server.limits.request_timeout_s = endless, 0.01, 0.1


def fail(error, after=0):
    def change(server):
        server.fake.failure, server.fake.fail_after = error, after

    return change


def full(server):
    server.limits.max_queued_requests = 0
    server.gate._max_queued = server.gate._limit = -server.INFO.max_seqs


def no_change(server):
    pass


RETRY = {"retry-after": r"[1-5]"}
NEVER = {"x-should-retry": "false"}
INVALID, TIMEOUT, DOWN = "invalid_request_error", "timeout", "service_unavailable"
# name: (change of the server, method, path, body, headers) → status, type, code, headers of the answer as patterns
CASES = {
    "cut JSON": (no_change, "POST", CHAT, b'{"a', JSON, 400, INVALID, "invalid_json", {}),
    "no object": (no_change, "POST", CHAT, b"[]", JSON, 400, INVALID, "invalid_type", {}),
    "no body": (no_change, "POST", CHAT, None, JSON, 400, INVALID, "invalid_json", {}),
    "deep": (no_change, "POST", CHAT, b'{"a":' + b"[" * 5000, JSON, 400, INVALID, "invalid_json", {}),
    "unknown path": (no_change, "POST", "/v1/embeddings", BODY, JSON, 404, INVALID, "unknown_url", {}),
    "path of 4 kB": (no_change, "GET", "/" + "x" * 4000, None, {}, 404, INVALID, "unknown_url", {}),
    "path that is no text": (no_change, "GET", "/%ff%00%ed%a0%80", None, {}, 404, INVALID, "unknown_url", {}),
    "no host": (no_change, "GET", "/nowhere", None, {"host": "[::"}, 404, INVALID, "unknown_url", {}),
    "unknown model": (no_change, "GET", "/v1/models/gpt", None, {}, 404, INVALID, "model_not_found", {}),
    "GET": (no_change, "GET", CHAT, None, {}, 405, INVALID, "method_not_allowed", {"allow": "POST"}),
    "DELETE": (no_change, "DELETE", "/v1/models", None, {}, 405, INVALID, "method_not_allowed", {"allow": ".*GET.*"}),
    "TRACE": (no_change, "TRACE", CHAT, None, {}, 405, INVALID, "method_not_allowed", {"allow": "POST"}),
    "QUERY": (no_change, "QUERY", CHAT, BODY, JSON, 405, INVALID, "method_not_allowed", {"allow": "POST"}),
    "OPTIONS": (no_change, "OPTIONS", CHAT, None, {}, 405, INVALID, "method_not_allowed", {"allow": "POST"}),
    "POST to health": (no_change, "POST", "/health", BODY, JSON, 405, INVALID, "method_not_allowed", {"allow": ".*GET.*"}),
    "too large": (no_change, "POST", CHAT, b" " * 50_000, JSON, 413, INVALID, "request_too_large", {"connection": "close"}),
    "form": (no_change, "POST", CHAT, b"a=b", {"content-type": "application/x-www-form-urlencoded"},
             415, INVALID, "unsupported_media_type", {}),
    "gzip": (no_change, "POST", CHAT, b"\x1f\x8b", {**JSON, "content-encoding": "gzip"},
             415, INVALID, "unsupported_media_type", {}),
    "queue full": (full, "POST", CHAT, BODY, JSON, 503, DOWN, "engine_overloaded", RETRY),
    "no first token": (lambda s: late(s, queue_timeout_s=0.05), "POST", CHAT, BODY, JSON,
                       503, DOWN, "engine_overloaded", RETRY),
    "deadline before a token": (lambda s: late(s, queue_timeout_s=None, request_timeout_s=0.05), "POST", CHAT, BODY, JSON,
                                408, TIMEOUT, "request_timeout", NEVER),
    "deadline after a token": (slow, "POST", CHAT, BODY, JSON, 504, TIMEOUT, "deadline_exceeded", NEVER),
    "pause": (pausing, "POST", CHAT, BODY, JSON, 504, TIMEOUT, "deadline_exceeded", NEVER),
    "loading": (fail(NotReady("x")), "POST", CHAT, BODY, JSON, 503, DOWN, "model_loading", RETRY),
    "replica's queue": (fail(Overloaded("x")), "POST", CHAT, BODY, JSON, 503, DOWN, "engine_overloaded", RETRY),
    "engine dead": (fail(EngineDead("x")), "POST", CHAT, BODY, JSON, 503, DOWN, "replica_lost", RETRY),
    "lost half-way": (fail(ReplicaLost("x"), 2), "POST", CHAT, BODY, JSON, 503, DOWN, "replica_lost", NEVER),
    "bug": (fail(ZeroDivisionError("/secret/path")), "POST", CHAT, BODY, JSON, 500, "server_error", None, {}),
}  # fmt: skip

# the same as a stream, except what is an event there (test_operations.py)
STREAMS = [name for name, case in CASES.items() if case[3] is BODY and not re.search("half-way|after a token|pause", name)]


@pytest.fixture
def log_lines(caplog):
    """Waits for the access records of so many requests: a line comes just after its answer."""
    caplog.set_level(logging.DEBUG, "mini_llm.access")

    def found():
        return [json.loads(record.getMessage()) for record in caplog.records if record.name == "mini_llm.access"]

    def lines(count):
        wait_until(lambda: len(found()) >= count)
        assert len(found()) == count
        return found()

    return lines


def check_envelope(status, headers, body, expected):
    want_status, kind, code, patterns = expected
    answer = json.loads(body)
    assert list(answer) == ["error"] and list(answer["error"]) == ["message", "type", "param", "code"]
    error = answer["error"]
    assert (status, error["type"], error["code"]) == (want_status, kind, code), error
    assert error["message"] and "secret" not in error["message"] and len(error["message"]) < 600
    assert headers["content-type"] == "application/json" and int(headers["content-length"]) == len(body)
    for name, pattern in patterns.items():
        assert re.fullmatch(pattern, headers[name]), headers


@pytest.mark.parametrize("name, stream", [*((name, False) for name in CASES), *((name, True) for name in STREAMS)])
def test_refusals(server, log_lines, name, stream):
    change, method, path, body, headers, *expected = CASES[name]
    gate = server.gate._max_queued, server.gate._limit
    change(server)
    try:
        body = {**body, "stream": True} if stream else body
        status, answered, raw = server.raw(method, path, body, {**headers, "x-request-id": "my-id.1"})
    finally:
        server.gate._max_queued, server.gate._limit = gate
    check_envelope(status, answered, raw, expected)
    assert answered["x-request-id"] == "my-id.1"
    (line,) = log_lines(1)
    assert (line["id"], line["status"], line["error"]) == ("my-id.1", status, expected[2] or expected[1])
    began = bool(server.fake.requests) and not isinstance(server.fake.failure, NotReady | Overloaded)
    assert line["method"] == method and ("finish" in line) == ("first token" in name or began)


def test_a_body_that_does_not_come(server, log_lines, monkeypatch):
    monkeypatch.setattr(body_module, "READ_TIMEOUT_S", 0.1)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"
    with socket.create_connection(("127.0.0.1", server.port), 5) as connection:
        connection.sendall(head)
        data = connection.recv(4096)
        while part := connection.recv(4096):
            data += part
    head, body = data.split(b"\r\n\r\n", 1)
    headers = dict(line.split(": ", 1) for line in head.decode().lower().split("\r\n")[1:])
    assert b" 408 " in head.split(b"\r\n")[0]
    check_envelope(408, headers, body, (408, TIMEOUT, "request_timeout", {**NEVER, "connection": "close"}))
    assert log_lines(1)[0]["status"] == 408


@pytest.mark.parametrize("sent", [b"{", b""])
def test_a_client_that_leaves_before_its_body_is_there(server, log_lines, sent):
    head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 5) as connection:
        connection.sendall(head + sent)
        time.sleep(0.05)
    (line,) = log_lines(1)
    assert (line["status"], line["error"]) == (499, "client_gone") and "finish" not in line


def test_request_ids_that_are_not_fit_for_a_header_or_a_log_are_replaced(server, log_lines):
    given = ["a" * 128, "!~", "a" * 129, "x" * 5000, "a b", "é", ""]
    answered = [server.raw("GET", "/version", None, {"x-request-id": one})[1]["x-request-id"] for one in given]
    assert answered[:2] == given[:2] and all(re.fullmatch("[0-9a-f]{32}", one) for one in answered[2:])
    assert sorted(line["id"] for line in log_lines(len(given))) == sorted(answered)


def test_a_refused_request_does_not_disturb_the_next_on_its_connection(server):
    """Keep-alive: the rest of a body that nobody read must not be taken for the next request."""
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    for path, body, headers, expected in [
        (CHAT, b"x" * 5000, {"content-type": "text/plain"}, 415),
        ("/nowhere", b"y" * 15_000, JSON, 404),
        ("/health", b"z" * 15_000, JSON, 405),
        (CHAT, json.dumps(BODY).encode(), JSON, 200),
    ]:
        connection.request("POST", path, body, headers)
        response = connection.getresponse()
        response.read()
        assert response.status == expected
    connection.close()


def test_many_clients_with_every_kind_of_request(server):
    """A short soak: good, bad, aborted and malformed requests at once. Nothing is left over, and nothing is a 500."""
    server.fake.delay = 0.005
    good = json.dumps({**BODY, "stream": True, "n": 2, "timings": True}).encode()
    payloads = [good, json.dumps(BODY).encode(), b'{"messages": 3}', b"{", b'{"prompt": "a", "max_tokens": -1}']
    statuses = []

    async def client(number):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        payload = payloads[number % len(payloads)]
        head = f"POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\nconnection: close\r\n"
        writer.write(head.encode() + b"content-length: %d\r\n\r\n" % len(payload) + payload)
        if number % 7 == 3:
            await asyncio.sleep(0.001 * (number % 5))
        else:
            answer = await reader.read()
            statuses.append(int(answer.split(b" ", 2)[1]))
            if payload is good and statuses[-1] == 200:
                assert answer.count(b'"finish_reason":"stop"') == 2 and answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        writer.close()

    async def run():
        for at in range(0, 600, 40):
            await asyncio.gather(*(client(number) for number in range(at, at + 40)))

    asyncio.run(run())
    server.wait_idle()
    assert set(statuses) == {200, 400, 503} and len(statuses) > 500  # an overloaded server does not even read bad bodies


def test_a_request_leaves_nothing_for_the_garbage_collector(server):
    """It would wait there in hundreds, and looking for them stops every stream for tens of milliseconds."""

    def jobs() -> list[Job]:
        return [one for one in gc.get_objects() if type(one) is Job]

    gc.collect()
    gc.disable()
    try:
        others = {id(job): job for job in jobs()}  # that the errors of other tests keep
        server.stream(max_tokens=3)
        server.chat(max_tokens=3)
        end = time.monotonic() + 2
        while left := sum(id(job) not in others for job in jobs()):
            assert time.monotonic() < end, f"{left} jobs are kept by a cycle"
            time.sleep(0.05)
    finally:
        gc.enable()
