"""The writer of a stream of server-sent events: coalescing, flow control, heartbeats."""

from __future__ import annotations

import asyncio
import time

from starlette.types import Send

from deployments.protocol.events import HEARTBEAT

SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class SseWriter:
    """Sends events; whatever has been added while an earlier send waited for a slow reader goes out in one piece.

    A reader that stops reading blocks flush() (the server's flow control), which stops the consumption of tokens: at
    most one list of events per choice waits here, and what the engine makes meanwhile goes out as one chunk later.
    `heartbeat` goes out after `heartbeat_s` seconds without events, also before the first. send_start passes the
    layers that look at the response's start; send goes past them: each would cost a coroutine per token only to hand
    the message on.
    """

    def __init__(self, send_start: Send, send: Send, heartbeat_s: float) -> None:
        self.started = False
        self.heartbeat = HEARTBEAT
        self.blocked_since: float | None = None  # time.perf_counter, while the server waits for the reader
        self._send_start = send_start
        self._send = send
        self._heartbeat_s = heartbeat_s
        self._parts: list[bytes] = []
        self._lock = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()
        self._beat: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        if heartbeat_s > 0:
            self._timer = self._loop.call_later(heartbeat_s, self._tick)

    def add(self, data: bytes) -> None:
        self._parts.append(data)

    async def flush(self, more: bool = True) -> None:
        async with self._lock:
            if not self._parts and more:
                return
            data = b"".join(self._parts)
            self._parts.clear()
            self.blocked_since = time.perf_counter()
            if not self.started:
                self.started = True
                await self._send_start({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
            await self._send({"type": "http.response.body", "body": data, "more_body": more})
            self.blocked_since = None
            self._last = self._loop.time()

    async def finish(self) -> None:
        """The last flush; ends the response at once (the official client waits only 0.1 s for the end after [DONE])."""
        self.stop()
        await self.flush(more=False)

    def stop(self) -> None:
        """No more heartbeats."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def close(self) -> None:
        """Whatever comes to an end here: a heartbeat that nobody reads is not waited for."""
        self.stop()
        if self._beat is not None:
            self._beat.cancel()

    def _tick(self) -> None:
        idle = self._loop.time() - self._last
        if idle >= self._heartbeat_s and not self._lock.locked():
            self.add(self.heartbeat)
            self._beat = self._loop.create_task(self.flush())
            idle = 0.0
        self._timer = self._loop.call_later(self._heartbeat_s - min(idle, self._heartbeat_s * 0.9), self._tick)
