"""The application on a real Ray cluster, started by the launcher, with a fake engine: HAProxy, both transports, failures.

One cluster for the whole file. The fake engine makes a token per 20 ms and request, drawn by the request's seed.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import yaml

from benchmarks.server import ROOT, Server, configuration, serving
from tests.deployments.raw import raw, speaks_our_words

pytestmark = pytest.mark.timeout(240)

LAUNCHER = (sys.executable, "-m", "deployments.launch")
PREFIX = {"llm": "", "twin": "/twin"}  # the application's name → its routes; llm: push, twin: handle
both = pytest.mark.parametrize("app", list(PREFIX))


def two_applications(config: dict) -> None:
    twin = deepcopy(config["applications"][0])
    twin.update(name="twin", route_prefix="/twin")
    twin["args"]["transport"] = "handle"
    config["applications"].append(twin)


@pytest.fixture(scope="module")
def server(smollm2_dir) -> Iterator[Server]:
    args = {"model": str(smollm2_dir), "step_ms": 20, "fallback": None, "drain_timeout_s": 2}
    with serving(args, import_path="benchmarks.fake_engine:build", edit=two_applications, command=LAUNCHER) as running:
        running.wait_until(lambda: "[serve] ready after" in running.log.read_text(), 60)
        yield running


def body(tokens: int, seed: int = 0) -> bytes:
    return json.dumps({"prompt": "a", "max_tokens": tokens, "seed": seed, "stream": True, "ignore_eos": True}).encode()


def stream(server: Server, app: str, tokens: int, seed: int = 0) -> Iterator[dict]:
    """The SSE events of one streamed completion; {"done": True} for the end mark."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", f"{PREFIX[app]}/v1/completions", body(tokens, seed), {"content-type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    for line in answer:
        if line.startswith(b"data: "):
            data = line[6:].strip()
            yield {"done": True} if data == b"[DONE]" else json.loads(data)
    connection.close()


def text(events: list[dict]) -> str:
    return "".join(choice["text"] for event in events for choice in event.get("choices", []))


def test_the_launcher_says_what_it_does_and_where_to_go(server):
    log = server.log.read_text()
    for line in ("configuration", "ports", "weights", "[serve] starting Ray", "[serve] llm/Model: healthy (1 running)",
                 "Model | I model SmolLM2-135M-Instruct ready in", "[serve] ready after", f"API         {server.url}/v1",
                 "dashboard   http://127.0.0.1:", "ray get-auth-token"):  # fmt: skip
        assert line in log, line


def test_both_transports_stream_the_same_text_token_by_token(server):
    push, handle = (list(stream(server, app, 12, seed=3)) for app in PREFIX)
    for events in (push, handle):
        assert events[-1] == {"done": True} and events[-2]["choices"][0]["finish_reason"] == "length"
        assert len(events) >= 8, "the answer came in a few pieces"
    assert text(push) == text(handle) != ""


@both
def test_many_streams_at_once_are_kept_apart(server, app):
    alone = text(list(stream(server, app, 10, seed=5)))
    answers: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda i=i: answers.update({i: text(list(stream(server, app, 10, seed=i % 8)))}))
        for i in range(40)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 40 and len(set(answers.values())) == 8
    assert {answers[i] for i in range(40) if i % 8 == 5} == {alone}


_WATCH = """
import json, sys, time
import ray
from ray import serve
ray.init(address=sys.argv[1], namespace="serve", log_to_driver=False, configure_logging=False)
models = [serve.get_deployment_handle("Model", app) for app in ("llm", "twin")]
while True:
    asked = time.time()
    running = [model.stats.remote().result().running for model in models]
    print(json.dumps([asked, time.time(), *running]), flush=True)
"""


def test_a_client_that_leaves_is_noticed_by_the_engine_in_under_50_ms(server):
    watcher = server.watch(_WATCH)
    try:
        readings = iter(lambda: json.loads(watcher.stdout.readline()), None)
        for column, app in enumerate(PREFIX, 2):
            delays, polls = [], []
            for _ in range(5):
                connection = socket.create_connection(("127.0.0.1", server.port), 30)
                request = body(5000)
                head = f"POST {PREFIX[app]}/v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
                connection.sendall(f"{head}content-length: {len(request)}\r\n\r\n".encode() + request)
                while b'"text":' not in connection.recv(65536):
                    pass
                assert next(reading for reading in readings if reading[column] == 1)
                left = time.time()
                connection.close()
                asked, answered = next(r[:2] for r in readings if r[0] > left and r[column] == 0)
                delays.append(answered - left)
                polls.append(answered - asked)
            # what a reading takes is not the server's delay; the median, because other processes share the cores
            assert statistics.median(delays) < 0.05 + statistics.median(polls), (app, delays, polls)
    finally:
        watcher.kill()
        watcher.communicate()


def ask(server: Server, method: str, path: str, body: bytes | None = None) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request(method, path, body, {"content-type": "application/json"})
    answer = connection.getresponse()
    found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    connection.close()
    return found


def test_errors_that_pass_the_proxy_have_our_envelope(server):
    for prefix in PREFIX.values():
        for method, path, body, status, code in [
            ("GET", "/nowhere", None, 404, "unknown_url"), ("DELETE", "/v1/models", None, 405, "method_not_allowed"),
            ("POST", "/v1/completions", b" " * 6_000_000, 413, "request_too_large"),
            ("POST", "/v1/completions", b'{"prompt"', 400, "invalid_json"),
        ]:  # fmt: skip
            found, headers, raw = ask(server, method, prefix + path, body)
            assert (found, json.loads(raw)["error"]["code"]) == (status, code) and headers["x-request-id"]
    status, _, raw = ask(server, "POST", "/twinned/v1/completions", b"{}")  # of the application at /, not of the one at /twin
    assert status == 404 and json.loads(raw)["error"]["code"] == "unknown_url"


def test_what_uvicorn_serve_and_haproxy_say_is_in_our_envelope(server):
    head, told = raw(server, b"BREW /v1/models HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and json.loads(told)["error"]["code"] == "invalid_http"
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("GET", "/v1/realtime", headers={
        "upgrade": "websocket", "connection": "upgrade", "sec-websocket-version": "13",
        "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ=="})  # fmt: skip
    answer = connection.getresponse()
    assert answer.status == 400 and json.loads(answer.read())["error"]["code"] == "websocket_unsupported"
    connection.close()
    deadline = b"x-request-timeout-seconds: 1.5\r\nconnection: close\r\ncontent-type: application/json\r\n"
    for prefix in PREFIX.values():
        request = body(500)
        post = f"POST {prefix}/v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {len(request)}\r\n".encode()
        head, told = raw(server, post + deadline + b"\r\n" + request)
        assert head.startswith(b"HTTP/1.1 200") and b'"code":"deadline_exceeded"' in told and b"[DONE]" in told
    speaks_our_words(server)


def test_a_killed_http_replica_is_told_in_our_envelope_and_then_waited_for(server):
    (victim,) = server.pids("ray::ServeReplica:llm:Api")
    answers = []
    whole = json.dumps({"prompt": "a", "max_tokens": 5000, "ignore_eos": True}).encode()

    def wait_for_an_answer():
        try:
            answers.append(ask(server, "POST", "/v1/completions", whole))
        except http.client.RemoteDisconnected:  # so HAProxy ends what went over a connection that it had used before
            answers.append(None)

    count = 64  # more than connections were left by the tests before
    threads = [threading.Thread(target=wait_for_an_answer) for _ in range(count)]
    for thread in threads:
        thread.start()
    server.wait_until(lambda: json.loads(server.get("/load")[1])["server_load"] == count, 20)
    os.kill(victim, signal.SIGKILL)
    for thread in threads:
        thread.join(30)
    told = [answer for answer in answers if answer is not None]
    assert len(answers) == count and told
    for status, headers, text in told:
        error = json.loads(text)["error"]
        assert (status, error["type"], error["code"]) == (503, "service_unavailable", "replica_lost")
        assert headers["content-type"] == "application/json" and headers["retry-after"] == "2"
    assert ask(server, "GET", "/health")[0] == 200  # held back by the proxy until another replica runs
    server.wait_until(lambda: server.get("/ready")[0] == 200, 60)
    assert list(stream(server, "llm", 5))[-1] == {"done": True}


@both
def test_a_killed_replica_gives_its_clients_an_error_event_and_comes_back(server, app):
    (victim,) = server.pids(f"ray::ServeReplica:{app}:Model")
    events = stream(server, app, 5000)
    for _ in range(3):
        assert "error" not in next(events)
    killed = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    (error,) = [event["error"] for event in events if "error" in event]
    assert error["code"] == "replica_lost" and time.monotonic() - killed < 5

    def back() -> bool:
        replaced = server.pids(f"ray::ServeReplica:{app}:Model") not in ([], [victim])
        return replaced and server.get(f"{PREFIX[app]}/ready")[0] == 200

    server.wait_until(back, 60)
    assert list(stream(server, app, 5))[-1] == {"done": True}


_DEPLOY = """
import sys, ray, yaml
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
ray.init(address=sys.argv[1], namespace="serve", log_to_driver=False, configure_logging=False)
_get_global_client().deploy_apps(ServeDeploySchema.model_validate(yaml.safe_load(sys.stdin.read())))
"""


def test_a_new_configuration_lets_streams_end_and_tells_those_that_take_too_long(server):
    path = server.ray_dir / "serve_config.yaml"
    config = yaml.safe_load(path.read_text())
    config["applications"][1]["args"]["step_ms"] = 19
    before = server.pids("ray::ServeReplica:twin")
    short, long = stream(server, "twin", 60), stream(server, "twin", 5000)
    for events in (short, long):
        next(events)
    deploying = server.watch(_DEPLOY)
    deploying.communicate(yaml.safe_dump(config), timeout=30)
    *_, last, done = short
    assert last["choices"][0]["finish_reason"] == "length" and done == {"done": True}
    *_, last, done = long
    assert last["error"]["code"] == "replica_lost" and done == {"done": True}
    server.wait_until(lambda: not {*before} & {*server.pids("ray::ServeReplica:twin")}, 60)
    server.wait_until(lambda: server.get("/twin/ready")[0] == 200, 60)


def test_terminate_lets_streams_end_tells_those_that_take_too_long_and_stops_everything(server):
    """Last of the cluster: it ends the server. Streams that end take 1.5 s more, longer than after Ctrl-C; they have 2."""
    short, long = ([stream(server, app, tokens) for app in PREFIX for _ in range(3)] for tokens in (75, 5000))
    for events in (*long, *short):
        next(events)
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    for events in short:
        *_, last, done = events
        assert last["choices"][0]["finish_reason"] == "length" and done == {"done": True}
    for events in long:
        *_, last, done = events
        assert last["error"]["code"] == "draining" and done == {"done": True}
    server.process.wait(30)
    assert time.monotonic() - began < 10
    assert server.process.returncode == 0
    server.wait_until(lambda: not server.pids(), 5)


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """Unlike tmp_path's, its name leaves room for Unix sockets, whose paths have at most 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="mini-llm-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def test_an_engine_that_cannot_start_ends_the_launcher_with_one_message(smollm2_dir, short_dir):
    """`serve run` would wait for ever."""
    config, _, _ = configuration(short_dir, {"model": str(smollm2_dir)}, "tests.deployments.broken_app:build")
    (short_dir / "config.yaml").write_text(yaml.safe_dump(config))
    environment = {**os.environ, "RAY_ADDRESS": "local", "RAY_TMPDIR": str(short_dir), "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run([*LAUNCHER, str(short_dir / "config.yaml")], cwd=ROOT, env=environment, text=True, timeout=150,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("EngineDead: this engine never starts:\nset broken to false"), done.stderr[-3000:]
    server = Server(done, 0, short_dir / "config.yaml", short_dir, 0)
    server.wait_until(lambda: not server.pids(), 5)
