"""Runs the work of one HTTP request while watching for a client that leaves or stops reading, and for deadlines."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, Protocol, TypeVar

from starlette.types import Scope

from deployments.protocol.body import ClientGone
from deployments.protocol.errors import bad_request, idle_too_long, overloaded, shut_down, timed_out
from deployments.protocol.limits import Limits

T = TypeVar("T")
LOOKS = 4  # in the time that a reader or the engine may pause: an eighth of it later, on average, the pause is noticed


class Progress(Protocol):
    """What the work tells about itself, in seconds of time.perf_counter; None: not yet, or not now."""

    def last_token_at(self) -> float | None: ...
    def blocked_since(self) -> float | None:
        """Since when it waits for the client to read."""
        ...


def timeout_of(scope: Scope) -> float | None:
    """Seconds that the client gives its request, by the header x-request-timeout. Raises ApiError 400."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-timeout"), None)
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        got = given[:40].decode("latin-1")
        raise bad_request(f"Invalid header 'x-request-timeout': expected seconds above 0, but got '{got}' instead.",
                          param="x-request-timeout")  # fmt: skip
    return seconds


async def supervise(
    work: Coroutine[Any, Any, T],
    receive: Callable[[], Awaitable[Any]],
    progress: Progress,
    limits: Limits,
    stopping: asyncio.Event,
    own_timeout_s: float | None = None,
) -> T:
    """The work's result. The work is cancelled, and has ended, when this raises:

    ClientGone when the client closed the connection or read nothing for reader_timeout_s; ApiError 503 when no token
    came within queue_timeout_s, or when `stopping` is set; 408 or 504 when request_timeout_s, the request's own timeout, or
    idle_timeout_s passed.
    `receive` is the ASGI callable with the request's body already read.
    """
    begun = time.perf_counter()
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    stopped = asyncio.ensure_future(stopping.wait())
    all_three = {task, gone, stopped}
    # pauses begin at any time, so that their deadlines are not known when a wait begins
    pauses = [seconds for seconds in (limits.reader_timeout_s, limits.idle_timeout_s) if seconds is not None]
    look = min(pauses, default=None)
    try:
        while True:
            now = time.perf_counter()
            due, error = min(_deadlines(begun, progress, limits, own_timeout_s), key=lambda pair: pair[0], default=(None, None))
            if due is not None and error is not None and due <= now:
                raise error()
            waits = [] if due is None else [due - now]
            if look is not None:
                waits.append(look / LOOKS)
            done, _ = await asyncio.wait(all_three, timeout=min(waits, default=None), return_when=asyncio.FIRST_COMPLETED)
            if task in done:
                return task.result()
            if done:
                raise ClientGone if gone in done else shut_down()
    finally:
        task.cancel()
        gone.cancel()
        stopped.cancel()
        await asyncio.wait(all_three)  # the engine has been told to stop before the request counts as over
        if not task.cancelled():
            task.exception()  # marks it as retrieved when a deadline or the client was first


def _deadlines(
    begun: float, progress: Progress, limits: Limits, own_timeout_s: float | None
) -> Iterator[tuple[float, Callable[[], Exception]]]:
    """Those that run now: when each is due, and what it raises."""
    token, blocked = progress.last_token_at(), progress.blocked_since()
    if limits.request_timeout_s is not None:
        total = limits.request_timeout_s
        yield begun + total, lambda: timed_out(f"this server's deadline of {total:g} s (request_timeout_s)", token is not None)
    if own_timeout_s is not None:
        words = f"its own deadline of {own_timeout_s:g} s (the header x-request-timeout)"
        yield begun + own_timeout_s, lambda: timed_out(words, token is not None)
    if blocked is not None:
        if limits.reader_timeout_s is not None:
            yield blocked + limits.reader_timeout_s, lambda: ClientGone("reader_stalled")
    elif token is None:
        if limits.queue_timeout_s is not None:
            first = limits.queue_timeout_s
            yield begun + first, lambda: overloaded(f"The request waited {first:g} s for its first token.", retry_after_s=5)
    elif limits.idle_timeout_s is not None:
        idle = limits.idle_timeout_s
        yield token + idle, lambda: idle_too_long(idle)


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
