"""One HTTP exchange over a raw socket, by a client of any manner: what no client library would do is the point."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from dataclasses import dataclass

from benchmarks.ask import Ask

SIP = 512  # bytes that a slow reader takes at a time
SIP_S = 0.01


@dataclass(frozen=True)
class Reply:
    """headers: names in lower case. None instead of a Reply: the client left."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        """The value of a header that may be there once."""
        values = [value for key, value in self.headers if key == name]
        assert len(values) < 2, f"header {name} came {len(values)} times"
        return values[0] if values else None


async def exchange(port: int, ask: Ask, timeout_s: float) -> Reply | None:
    """Raises TimeoutError, ConnectionError, or ValueError for what is not HTTP."""
    return await asyncio.wait_for(_exchange(port, ask), timeout_s)


async def _exchange(port: int, ask: Ask) -> Reply | None:
    connection = socket.socket()
    try:
        connection.setblocking(False)
        if ask.manner == "slow":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        if ask.manner == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
        return await _converse(connection, ask)
    finally:
        connection.close()


async def _converse(connection: socket.socket, ask: Ask) -> Reply | None:
    loop = asyncio.get_running_loop()
    leaves = ask.manner in ("leave", "reset")
    request = ask.head() + ask.body
    if leaves and ask.patience < 0:
        await loop.sock_sendall(connection, request[: ask.patience])
        await asyncio.sleep(random.random() * 0.05)
        return None
    received = bytearray()
    try:
        await loop.sock_sendall(connection, request)
    except ConnectionError:  # refused before all of it was sent: the answer may be there to read
        if leaves:
            return None
    while not leaves or len(received) < ask.patience:
        part = await loop.sock_recv(connection, SIP if ask.manner == "slow" else 1 << 16)
        if not part:
            return _reply(bytes(received))
        received += part
        if ask.manner == "slow" and len(received) < 40 * SIP:
            await asyncio.sleep(SIP_S)
    return None


def _reply(raw: bytes) -> Reply:
    head, end, rest = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    if not end or not first.startswith("HTTP/1."):
        raise ValueError(f"no HTTP answer: {raw[:200]!r}")
    headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    facts = dict(headers)
    if facts.get("transfer-encoding") == "chunked":
        rest = _unchunk(rest)
    elif (length := facts.get("content-length")) is not None and len(rest) != int(length):
        raise ValueError(f"{len(rest)} bytes of a body of {length}")
    return Reply(int(first.split()[1]), headers, rest)


def _unchunk(data: bytes) -> bytes:
    parts: list[bytes] = []
    at = 0
    while True:
        end = data.find(b"\r\n", at)
        if end < 0:
            raise ValueError(f"a chunked body that does not end: ...{data[-200:]!r}")
        size = int(data[at:end], 16)
        if size == 0:
            return b"".join(parts)
        parts.append(data[end + 2 : end + 2 + size])
        at = end + 4 + size
