"""Readers that are slow or stop reading, over real sockets: they keep nobody waiting, and are let go in the end."""

import json
import socket
import time

import pytest

from tests.waiting import wait_until

BODY = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"


def long_winded(request):
    return [97] * 200


def connect(server, **fields):
    """A running request whose client reads nothing and offers little room; its answer is some 2 MB."""
    body = json.dumps({**BODY, "n": 8, "logprobs": True, "top_logprobs": 20, **fields}).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    connection.sendall(HEAD % len(body) + body)
    return connection


@pytest.fixture
def stalled(server):
    """A connection that has blocked its request: the server has made a part of the tokens and makes no more."""
    server.limits.max_queued_requests = 100
    server.fake.script = long_winded
    connection = connect(server)

    def stands_still() -> bool:
        before = server.fake.produced
        time.sleep(0.1)
        return server.fake.running and 0 < before == server.fake.produced

    wait_until(stands_still)
    assert server.fake.produced < 8 * 200
    yield connection
    connection.close()


def test_a_reader_that_does_not_read_delays_nobody(server, stalled):
    produced = server.fake.produced
    begun = time.monotonic()
    for _ in range(5):
        assert len(server.stream(max_tokens=50)) == 53  # role, 50 tokens, finish, [DONE]
    assert time.monotonic() - begun < 2.0  # 0.1 s on an idle machine
    assert server.fake.produced == produced + 250  # not one for the other


def test_a_reader_that_does_not_read_is_cut_off(server, caplog):
    caplog.set_level("INFO", "mini_llm.access")
    server.limits.max_queued_requests, server.limits.reader_timeout_s = 100, 0.2
    server.fake.script = long_winded
    begun = time.monotonic()
    with connect(server) as connection:
        wait_until(lambda: server.fake.running)
        wait_until(lambda: server.gate.active == 0 and caplog.records)
        assert time.monotonic() - begun < 5
        lines = [record.getMessage() for record in caplog.records if record.name == "mini_llm.access"]
        line = json.loads(lines[-1])
        assert (line["status"], line["error"]) == (499, "reader_stalled") and "abort" in line["finish"]
        connection.settimeout(5)
        received = b""
        try:
            while part := connection.recv(1 << 16):
                received += part
        except ConnectionResetError:
            pass
        assert b"[DONE]" not in received and not received.endswith(b"0\r\n\r\n")  # cut: it cannot look complete


def test_a_slow_reader_gets_everything_in_fewer_pieces(server, stalled):
    text = b""
    while not text.endswith(b"0\r\n\r\n"):
        text += stalled.recv(1 << 16)
        time.sleep(0.0005)
    assert text.count(b'"content":"a"}') == 8 * 200 and b"data: [DONE]\n\n" in text


def test_an_engine_that_stops_giving_tokens(server):
    server.limits.idle_timeout_s = 0.1
    server.fake.script, server.fake.delay = long_winded, 30
    status, headers, answer = server.chat()
    assert (status, answer["error"]["code"]) == (504, "deadline_exceeded") and headers["x-should-retry"] == "false"
    assert "idle_timeout_s" in answer["error"]["message"]
    *_, error, done = server.stream()
    assert error["error"]["code"] == "deadline_exceeded" and done == "[DONE]"
    server.fake.delay = 0.03
    assert server.stream(max_tokens=10)[-1] == "[DONE]"  # 0.3 s in all: the deadline is between tokens
