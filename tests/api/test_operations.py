"""Admission, deadlines, disconnects, failures of the engine, health, logs."""

import asyncio
import http.client
import json
import logging
import re
import socket
import threading
import time

import openai
import pytest

from deployments.api import service as service_module
from deployments.api.app import create_app
from deployments.transport.base import NotReady, Overloaded, ReplicaLost
from model_core.errors import EngineDead, RequestError
from tests.api.conftest import endless
from tests.waiting import wait_until

MESSAGES = [{"role": "user", "content": "hi"}]


HEAD = b"""POST /v1/chat/completions HTTP/1.1\r
host: a\r
content-type: application/json\r
content-length: %d\r
\r
"""


def open_stream(server, **fields):
    """A raw connection with a running request on it."""
    body = json.dumps({"messages": MESSAGES, "stream": True, **fields}).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), 10)
    connection.sendall(HEAD % len(body) + body)
    return connection


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_aborts_its_sequences(server, stream, n):
    server.fake.script, server.fake.delay = endless, 0.01
    connection = open_stream(server, stream=stream, n=n)
    wait_until(lambda: server.fake.produced > 3 * n)
    assert server.gate.active == n
    connection.close()
    left = time.monotonic()
    wait_until(lambda: len(server.fake.aborted) == n)
    assert max(server.fake.aborted.values()) - left < 0.5  # measured: 0.2 to 0.4 ms; the rest is for a busy machine
    server.wait_idle()


def test_a_client_that_leaves_before_the_first_token(server):
    server.fake.first_delay = 30
    connection = open_stream(server)
    wait_until(lambda: server.fake.running)
    connection.close()
    wait_until(lambda: server.fake.aborted)


@pytest.mark.parametrize(
    "failure, status, code",
    [
        (RequestError("prompt of 9 tokens: 3 pages too many", param="prompt", code="too_long"), 400, "too_long"),
        (NotReady("loading"), 503, "model_loading"),
        (Overloaded("queue full"), 503, "engine_overloaded"),
        (ReplicaLost("actor died"), 503, "replica_lost"),
        (EngineDead("thread ended"), 503, "replica_lost"),
        (OSError("bug"), 500, None),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_failures_before_the_first_token_are_plain_answers(server, failure, status, code, stream):
    server.fake.failure = failure
    got, headers, answer = server.chat(stream=stream)
    assert (got, answer["error"]["code"]) == (status, code)
    assert ("retry-after" in headers) == (status == 503)


def test_replica_loss_in_mid_stream(server):
    server.fake.failure, server.fake.fail_after = ReplicaLost("killed"), 2
    *chunks, error, done = server.stream()
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "Hello world"
    assert error["error"]["code"] == "replica_lost" and done == "[DONE]"
    with pytest.raises(openai.APIError, match="replica"):
        list(server.client().chat.completions.create(model="acme/tiny", messages=MESSAGES, stream=True))
    got, headers, _ = server.chat()  # not streamed, but work was done: the client must not repeat it blindly
    assert got == 503 and headers["x-should-retry"] == "false"


def test_one_failing_choice_ends_them_all(server):
    def script(request):
        if request.request_id.endswith("-1"):
            raise ReplicaLost("gone")
        return endless(request)

    server.fake.script, server.fake.delay = script, 0.005
    assert server.chat(n=3)[0] == 503
    server.wait_idle()
    assert len(server.fake.aborted) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_has_begun_waits_for_room_for_its_other_choices(server, stream):
    """Several HTTP replicas may let in more than the engine holds."""
    fake, refusals = server.fake, iter([Overloaded("full"), Overloaded("full")])

    class Full(type(fake)):
        async def generate(self, request):
            if not request.request_id.endswith("-0") and (error := next(refusals, None)):
                raise error
            async for events in super().generate(request):
                yield events

    fake.__class__ = Full
    try:
        fields = {"prompt": "a" * 100, "n": 3, "stream": stream}
        status, _, body = server.raw("POST", "/v1/completions", fields)
        texts = {}
        for event in server.events(body)[:-1] if stream else [json.loads(body)]:
            for choice in event["choices"]:
                texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        assert status == 200 and texts == dict.fromkeys(range(3), "Hello world!") and next(refusals, None) is None
    finally:
        fake.__class__ = Full.__base__


def test_admission(server):
    server.fake.script, server.fake.delay = endless, 0.01
    holders = [open_stream(server, n=8), open_stream(server, n=7)]  # 8 slots and 8 places to wait
    wait_until(lambda: server.gate.active == 15)
    assert server.chat(n=2)[0] == 503
    holders.append(open_stream(server))
    wait_until(lambda: server.gate.active == 16)
    status, headers, answer = server.chat()
    assert status == 503 and answer["error"]["code"] == "engine_overloaded"
    assert answer["error"]["type"] == "service_unavailable" and 1 <= int(headers["retry-after"]) <= 5
    with pytest.raises(openai.InternalServerError):
        server.client().chat.completions.create(model="acme/tiny", messages=MESSAGES)
    for holder in holders:
        holder.close()
    server.wait_idle()
    server.fake.script = lambda request: [97]
    assert server.chat()[0] == 200


@pytest.mark.parametrize("path, fields, param", [
    ("/v1/chat/completions", {"messages": MESSAGES, "n": 17}, "n"), ("/v1/chat/completions", {"prompt": "a", "n": 17}, "n"),
    ("/v1/completions", {"prompt": "a", "n": 17}, "n"), ("/v1/completions", {"prompt": ["a", "b", "c"], "n": 6}, "prompt"),
])  # fmt: skip
def test_more_sequences_than_there_can_ever_be_room_for(server, path, fields, param):
    """A 503 would be tried again for ever: 8 run and 8 wait."""
    server.limits.max_n = 32
    status, _, answer = server.raw("POST", path, fields)
    error = json.loads(answer)["error"]
    assert status == 400 and error["param"] == param and "16 sequences this server takes at once" in error["message"]


def test_loading_then_ready(fresh_server):
    server = fresh_server()
    server.fake.ready = False
    assert server.raw("GET", "/health")[0] == 200
    status, headers, body = server.raw("GET", "/ready")
    assert status == 503 and json.loads(body) == {"status": "loading"} and headers["retry-after"]
    status, headers, answer = server.chat()
    assert status == 503 and answer["error"]["code"] == "model_loading" and headers["retry-after"]
    assert server.raw("GET", "/v1/models")[0] == 503
    assert server.raw("GET", "/metrics")[0] == 200
    server.fake.ready = True
    assert server.raw("GET", "/ready")[0] == 200 and server.chat()[0] == 200
    server.fake.ready = False  # the replica died
    assert server.raw("GET", "/ready")[0] == 503 and server.raw("GET", "/v1/models")[0] == 200


def test_draining(fresh_server):
    server = fresh_server()
    server.fake.delay = 0.05
    answers = []
    running = threading.Thread(target=lambda: answers.append(server.chat()))
    running.start()
    wait_until(lambda: server.fake.produced)
    server.gate.drain()
    status, headers, answer = server.chat()
    assert status == 503 and answer["error"]["code"] == "draining" and headers["retry-after"]
    assert server.raw("GET", "/ready")[0] == 503
    running.join()
    assert answers[0][0] == 200


def test_stopping_ends_what_still_runs_after_its_grace(fresh_server):
    server = fresh_server()
    server.fake.delay = 0.05
    answers = {}

    def ask(name, tokens, stream):
        server.fake.script = endless
        body = {"messages": MESSAGES, "max_tokens": tokens, "stream": stream}
        answers[name] = server.raw("POST", "/v1/chat/completions", body)

    asks = [("short", 4, True), ("long", 200, True), ("whole", 200, False)]
    threads = [threading.Thread(target=ask, args=args) for args in asks]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(server.fake.running) == 3 and server.fake.produced > 5)
    service, loop = server.app.state.service, server._server.servers[0].get_loop()
    asyncio.run_coroutine_threadsafe(service.stop(grace_s=0.5), loop).result(5)
    assert not server.gate.active and not server.fake.running
    for thread in threads:
        thread.join()
    assert server.events(answers["short"][2])[-2]["choices"][0]["finish_reason"] == "length"
    error, done = server.events(answers["long"][2])[-2:]
    assert error["error"]["code"] == "draining" and done == "[DONE]"
    status, headers, raw = answers["whole"]
    assert (status, json.loads(raw)["error"]["code"], headers["retry-after"]) == (503, "draining", "5")


def test_queue_timeout(server):
    server.fake.first_delay = 30
    server.limits.queue_timeout_s = 0.05
    status, headers, answer = server.chat()
    assert status == 503 and answer["error"]["code"] == "engine_overloaded" and headers["retry-after"]
    wait_until(lambda: len(server.fake.aborted) == 1)


def test_total_deadline(server):
    server.limits.request_timeout_s = 0.1
    server.limits.queue_timeout_s = None
    server.fake.first_delay = 30
    status, headers, answer = server.chat()
    assert (status, answer["error"]["code"]) == (408, "request_timeout") and headers["x-should-retry"] == "false"
    server.fake.first_delay = 0
    server.fake.script, server.fake.delay = endless, 0.01
    status, headers, answer = server.chat()
    assert (status, answer["error"]["code"]) == (504, "deadline_exceeded") and headers["x-should-retry"] == "false"
    *chunks, error, done = server.stream()
    assert len(chunks) > 2 and error["error"]["code"] == "deadline_exceeded" and done == "[DONE]"
    assert len(server.fake.aborted) == 3


def test_heartbeats_before_the_first_token_and_between_tokens(server):
    server.limits.heartbeat_s = 0.05
    server.fake.first_delay = server.fake.delay = 0.13
    result = server.stream(max_tokens=2)
    beats = [i for i, event in enumerate(result) if event == ": keep-alive"]
    assert result[0] == ": keep-alive" and len(beats) >= 4 and result[-1] == "[DONE]"
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in result if isinstance(e, dict)) == "Hello world"
    stream = server.client().chat.completions.create(model="", messages=MESSAGES, stream=True, max_tokens=2)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "Hello world"


def test_a_failure_after_a_heartbeat_is_an_event(server):
    server.limits.heartbeat_s = 0.03
    server.fake.first_delay, server.fake.failure = 0.1, ReplicaLost("gone")
    result = server.stream()
    assert result[0] == ": keep-alive" and result[-1] == "[DONE]" and result[-2]["error"]["code"] == "replica_lost"


def test_pending_events_go_out_together_but_stay_separate(server):
    server.fake.group = 4
    assert server.stream()[1]["choices"][0]["delta"]["content"] == "Hello world!"


def test_a_slow_reader_does_not_pile_up_tokens(server):
    """While the server's send waits for the reader, tokens stay with the transport."""
    fake = type(server.fake)(script=endless)
    app = create_app(fake, server.app.state.service.tokenizer, server.limits)
    body = json.dumps({"prompt": "a", "stream": True, "max_tokens": 50, "n": 2}).encode()

    async def run() -> list[bytes]:
        reader_is_back = asyncio.Event()
        request = [{"type": "http.request", "body": body}]
        sent: list[bytes] = []

        async def receive():
            if request:
                return request.pop()
            await asyncio.sleep(3600)

        async def send(message):
            if message["type"] == "http.response.body":
                sent.append(message["body"])
                if len(sent) == 2:
                    await reader_is_back.wait()

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers}
        task = asyncio.ensure_future(app(scope, receive, send))
        await asyncio.sleep(0.2)
        assert len(sent) == 2 and fake.produced <= 4  # one list of events per choice may wait
        reader_is_back.set()
        await task
        return sent

    sent = asyncio.run(run())
    assert b"".join(sent).count(b'"content":"a"}') == 100 and b"".join(sent).endswith(b"data: [DONE]\n\n")


def test_request_ids(server):
    status, headers, _ = server.raw("GET", "/health", headers={"x-request-id": "abc-1"})
    assert headers["x-request-id"] == "abc-1"
    for bad in ("x" * 129, "a b", "\xe9"):
        _, headers, _ = server.raw("GET", "/health", headers={"x-request-id": bad})
        assert re.fullmatch("[0-9a-f]{32}", headers["x-request-id"])
    assert server.raw("GET", "/nowhere")[1]["x-request-id"] and server.chat(n=0)[1]["x-request-id"]
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    body = json.dumps({"prompt": "a", "stream": True})
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json", "x-request-id": "s1"})
    response = connection.getresponse()
    assert response.headers.get_all("x-request-id") == ["s1"]
    connection.close()


def test_models(server):
    [card] = server.client().models.list().data
    assert card.id == "acme/tiny" and card.max_model_len == 256 and card.meta["source"] == "disk"
    assert server.client().models.retrieve("acme/tiny").id == "acme/tiny"  # with a slash in it


def test_small_endpoints(server):
    assert json.loads(server.raw("GET", "/version")[2])["version"]
    assert json.loads(server.raw("GET", "/")[2])["models"]
    assert json.loads(server.raw("GET", "/debug/dispatch")[2])["data"] == [{"op": "rmsnorm", "choice": "torch"}]
    assert server.raw("HEAD", "/health")[0] == 200


def test_a_client_may_ask_for_a_shorter_deadline(server):
    server.fake.script, server.fake.delay = endless, 0.01
    body = {"messages": MESSAGES, "stream": True}

    def ask(timeout, **fields):
        headers = {"content-type": "application/json", "x-request-timeout": timeout}
        return server.raw("POST", "/v1/chat/completions", {**body, **fields}, headers)

    begun = time.monotonic()
    *chunks, error, done = server.events(ask("0.1")[2])
    assert len(chunks) > 2 and error["error"]["code"] == "deadline_exceeded" and done == "[DONE]"
    assert "its own deadline of 0.1 s" in error["error"]["message"] and time.monotonic() - begun < 5
    status, _, raw = ask("0.1", stream=False)
    assert (status, json.loads(raw)["error"]["type"]) == (504, "timeout")
    server.limits.request_timeout_s = 0.1
    assert "this server's deadline of 0.1 s" in json.loads(ask("1e9", stream=False)[2])["error"]["message"]
    for bad in ("0", "-1", "nan", "inf", "soon", ""):
        status, _, raw = ask(bad)
        assert status == 400 and json.loads(raw)["error"]["param"] == "x-request-timeout"
    server.fake.first_delay = 30
    status, headers, raw = ask("0.05")
    assert (status, json.loads(raw)["error"]["code"], headers["x-should-retry"]) == (408, "request_timeout", "false")


def test_the_access_log_has_one_line_and_no_text(server, caplog):
    with caplog.at_level(logging.INFO, "mini_llm.access"):
        server.chat(messages=[{"role": "user", "content": "my secret"}], n=2)
        server.chat(n=0)
        connection = open_stream(server)
        connection.close()
        wait_until(lambda: len(caplog.records) == 3)
    good, bad, gone = (json.loads(record.getMessage()) for record in caplog.records)
    assert good["status"] == 200 and good["finish"] == "stop,stop" and good["completion_tokens"] == 8
    assert good["route"] == "/v1/chat/completions" and good["n"] == 2 and good["stream"] is False
    assert 0 < good["ttft_ms"] <= good["total_ms"] and (good["queue_ms"], good["prefill_ms"]) == (2, 4)
    assert bad["status"] == 400 and bad["error"] == "integer_below_min_value"
    assert gone["stream"] is True
    assert "secret" not in caplog.text and "Hello" not in caplog.text


def test_a_model_replica_that_hangs_is_not_waited_for(fresh_server, monkeypatch):
    monkeypatch.setattr(service_module, "PROBE_TIMEOUT_S", 0.05)
    server = fresh_server()
    assert server.raw("GET", "/v1/models")[0] == 200
    hung = lambda: asyncio.sleep(30)  # noqa: E731
    monkeypatch.setattr(server.fake, "stats", hung)
    monkeypatch.setattr(server.fake, "dispatch_table", hung)
    began = time.monotonic()
    assert [server.raw("GET", path)[0] for path in ("/health", "/ready", "/metrics", "/v1/models", "/debug/dispatch")] == [
        200, 503, 200, 200, 503
    ]  # fmt: skip
    assert time.monotonic() - began < 5


def test_browsers_get_a_page_and_programs_json(server):
    browser = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    as_json = "application/json"
    for headers, kind in ((browser, "text/html; charset=utf-8"), ({"accept": "*/*"}, as_json), ({}, as_json)):
        status, told, _ = server.raw("GET", "/", headers=headers)
        assert (status, told["content-type"], told["vary"]) == (200, kind, "accept")
    _, told, page = server.raw("GET", "/", headers=browser)
    assert "default-src 'none'" in told["content-security-policy"] and not re.search(rb"https?://|src=|@import|url\(", page)
    paths = json.loads(server.raw("GET", "/openapi.json")[2])["paths"]
    asked = re.findall(r'base \+ "(/[\w/]+)', page.decode())
    assert {"/v1/chat/completions", "/v1/models", "/metrics", "/docs"} == {*asked} and {*asked} <= paths.keys()
    metrics = server.raw("GET", "/metrics")[2].decode()
    assert all(f"\n{name}{{" in metrics for name in re.findall(r'"(vllm:[^"]+)"', page.decode()))
