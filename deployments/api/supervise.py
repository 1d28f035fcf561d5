"""Runs the work of one HTTP request while watching for a client that leaves and for deadlines that pass."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from deployments.protocol.body import ClientGone
from deployments.protocol.errors import overloaded, timed_out

T = TypeVar("T")


async def supervise(
    work: Coroutine[Any, Any, T],
    receive: Callable[[], Awaitable[Any]],
    *,
    started: Callable[[], bool],
    first_token_s: float | None,
    total_s: float | None,
) -> T:
    """The work's result. The work is cancelled, and has ended, when this raises:

    ClientGone when the client closed the connection; ApiError 503 when no token came within first_token_s; 408 or 504
    when total_s passed. `receive` is the ASGI callable with the request's body already read. None: no deadline.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    both = {task, gone}
    try:
        begun = asyncio.get_running_loop().time()
        done: set[asyncio.Future[Any]] = set()
        if first_token_s is not None and (total_s is None or first_token_s < total_s):
            done, _ = await asyncio.wait(both, timeout=first_token_s, return_when=asyncio.FIRST_COMPLETED)
            if not done and not started():
                raise overloaded(f"The request waited {first_token_s:g} s for its first token.", retry_after_s=5)
        if not done:
            left = None if total_s is None else begun + total_s - asyncio.get_running_loop().time()
            done, _ = await asyncio.wait(both, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            assert total_s is not None
            raise timed_out(total_s, started=started())
        if task in done:
            return task.result()
        raise ClientGone
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.wait(both)  # the engine has been told to stop before the request counts as over
        if not task.cancelled():
            task.exception()  # marks it as retrieved when a deadline or the client was first


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
