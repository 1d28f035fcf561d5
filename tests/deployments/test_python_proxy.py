"""The same application behind Ray Serve's own proxy instead of HAProxy: all errors have our envelope, from the first one on."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from benchmarks.server import Server, serving
from tests.deployments.raw import raw

pytestmark = pytest.mark.timeout(180)


def without_haproxy(config: dict) -> None:
    for part in (config["controller_options"], config["applications"][0]):
        part["runtime_env"]["env_vars"]["RAY_SERVE_ENABLE_HA_PROXY"] = "0"


@pytest.fixture(scope="module")
def server(smollm2_dir) -> Iterator[Server]:
    args = {"model": str(smollm2_dir), "step_ms": 20, "fallback": None}
    with serving(args, import_path="benchmarks.fake_engine:build", edit=without_haproxy, wait=False) as running:
        yield running


def refusal(server: Server, request: bytes) -> tuple[int, dict]:
    """Status and error of an answer that may not be HTTP's fault alone."""
    head, body = raw(server, request)
    assert b"content-type: application/json" in head.lower(), (head, body)
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return int(head.split()[1]), error


def post(headers: str, **fields) -> bytes:
    body = json.dumps({"prompt": "a", "ignore_eos": True, **fields}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-type: application/json\r\n{headers}"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def test_every_error_has_our_envelope(server):
    told: list[tuple[int, str]] = []

    def seen() -> bool:
        told.append(server.get("/v1/models"))
        return told[-1][0] != 0

    server.wait_until(seen, 120)  # before the application is there
    status, text = told[-1]
    assert status == 200 or (status, json.loads(text)["error"]["code"]) == (404, "unknown_url")
    server.wait_ready()
    for noise in (b"nonsense\r\n\r\n", b"BREW / HTTP/1.1\r\nhost: a\r\n\r\n", b"GET / HTTP/1.1\r\nhost: a\r\nb c: d\r\n\r\n"):
        status, error = refusal(server, noise)
        assert (status, error["code"]) == (400, "invalid_http")
    status, error = refusal(server, post("x-request-timeout-seconds: 1.5\r\n", max_tokens=500))
    assert (status, error["code"]) == (504, "deadline_exceeded")
    status, error = refusal(server, b"GET /nowhere HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
    assert (status, error["code"]) == (404, "unknown_url")


def test_a_killed_http_replica_is_told_in_our_envelope(server):
    (victim,) = server.pids("ray::ServeReplica:llm:Api")
    answers = []
    thread = threading.Thread(target=lambda: answers.append(refusal(server, post("", max_tokens=5000))))
    thread.start()
    server.wait_until(lambda: json.loads(server.get("/load")[1])["server_load"] == 1, 20)
    killed = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    thread.join(30)
    [(status, error)] = answers
    assert (status, error["code"]) == (503, "replica_lost") and time.monotonic() - killed < 10
