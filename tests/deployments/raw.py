"""Requests that no client library would send."""

from __future__ import annotations

import socket

from benchmarks.server import Server


def raw(server: Server, request: bytes) -> tuple[bytes, bytes]:
    """Head and body of the answer; its end is that of the connection."""
    with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
        connection.sendall(request)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    return head, body
