"""Requests that no client library would send."""

from __future__ import annotations

import socket

from benchmarks.server import Server

TO_HAPROXY = (  # what it answers by itself: 400, 400, 422 and 404
    b"nonsense\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"x" * 15360 + b"\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
)


def raw(server: Server, request: bytes) -> tuple[bytes, bytes]:
    """Head and body of the answer; its end is that of the connection."""
    with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
        connection.sendall(request)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    return head, body
