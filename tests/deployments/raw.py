"""Requests that no client library would send."""

from __future__ import annotations

import json
import socket

from benchmarks.server import Server

_GET, _POST = b"GET / HTTP/1.1\r\nhost: a\r\n", b"POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"

TO_HAPROXY = (  # what it answers by itself, with the status and the code of our answers
    (b"nonsense\r\n\r\n", 400, "invalid_http"),
    (_GET + b"a b: c\r\n\r\n", 400, "invalid_http"),
    (_GET + b"x: " + b"x" * 15360 + b"\r\n\r\n", 400, "invalid_http"),
    (_POST + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabcd", 400, "invalid_http"),
    (_POST + b"transfer-encoding: chunked\r\n\r\nx\r\n", 400, "invalid_http"),
    (b"GET / HTTP/1.0\r\ncontent-length: 3\r\n\r\nabc", 413, "invalid_http"),
    (_POST + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 422, "invalid_http"),
    (b"OPTIONS * HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", 404, "unknown_url"),
)


def raw(server: Server, request: bytes) -> tuple[bytes, bytes]:
    """Head and body of the answer; its end is that of the connection."""
    return ask(server.port, request)


def speaks_our_words(server: Server) -> None:
    """HAProxy, of what it answers by itself."""
    for request, status, code in TO_HAPROXY:
        check(request, *raw(server, request), status, code)


def check(request: bytes, head: bytes, body: bytes, status: int, code: str) -> None:
    """An answer to `request` is an error in our envelope."""
    assert head.startswith(b"HTTP/1.1 %d " % status) and b"\r\ncontent-type: application/json" in head, (request, head)
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["code"] == code


def ask(port: int, request: bytes) -> tuple[bytes, bytes]:
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        connection.sendall(request)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    return head, body
