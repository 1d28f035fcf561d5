"""The model replica's end of the push transport: one connection to each Api replica, one frame per engine step.

Needs neither Ray nor an engine. Everything here runs on the replica's event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, NamedTuple, cast

from deployments.transport.wire import MAGIC, WireError, encode_event, pack_frame
from model_core.engine.request import TokenEvent

log = logging.getLogger("mini_llm.transport")

MAX_UNREAD = 1 << 20  # bytes; about 80,000 tokens that an Api replica has not read: it hangs or is drowning
# (log-probabilities of prompts are not counted: a single step may bring more of them)
CONNECT_TIMEOUT_S = 5.0


class ReplyTo(NamedTuple):
    """Where an Api replica listens for tokens. secret: 32 random bytes that the hello must carry."""

    host: str
    port: int
    secret: bytes


class Link(asyncio.Protocol):
    """A connection to one Api replica. `on_lost(link, reason)` is called once when it breaks or is dropped."""

    def __init__(self, reply_to: ReplyTo, on_lost: Callable[[Link, str], None], max_unread: int = MAX_UNREAD) -> None:
        self.reply_to = reply_to
        self.frames = 0
        self._on_lost = on_lost
        self._max_unread = max_unread
        self._events: list[list[Any]] = []
        self._uncounted = 0  # bytes of prompt log-probabilities that may be unread
        self._transport: asyncio.Transport | None = None
        self._reason: str | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports are no subclass of it
        self._transport.write(pack_frame([MAGIC, self.reply_to.secret]))

    def connection_lost(self, error: Exception | None) -> None:
        self._drop(self._reason or f"the connection to the Api replica broke ({error or 'closed'})")

    @property
    def is_open(self) -> bool:
        return self._transport is not None

    def add(self, rid: int, event: TokenEvent) -> None:
        """Put an event of request `rid` into the frame that the next flush() sends; log-probabilities of a prompt are one of
        their own, which always keeps it below MAX_FRAME (see engine/validate.py)."""
        if event.prompt is None:
            self._events.append(encode_event(rid, event))
            return
        self.flush()
        self._events.append(encode_event(rid, event))
        self._uncounted += 8 * (len(event.prompt.own) + len(event.prompt.top_ids))
        self.flush()

    def flush(self) -> None:
        """Send what was added as one frame. Never blocks: a peer that does not read is dropped."""
        events, self._events = self._events, []
        if not events or self._transport is None:
            return
        try:
            self._transport.write(pack_frame([self.frames, events]))
        except WireError as error:
            return self._abort(str(error))
        self.frames += 1
        unread = self._transport.get_write_buffer_size()
        self._uncounted = min(self._uncounted, unread)
        if unread - self._uncounted > self._max_unread:
            self._abort(f"the Api replica has left {unread} bytes of tokens unread")

    def close(self) -> None:
        """End the connection after what was sent has gone out; on_lost is not called."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()

    def _abort(self, reason: str) -> None:
        transport = self._transport
        self._drop(reason)
        if transport is not None:
            transport.abort()

    def _drop(self, reason: str) -> None:
        if self._transport is not None:
            self._transport = None
            self._events = []
            self._on_lost(self, reason)


class Links:
    """The open links of one model replica, by address; a broken one is made anew at the next request."""

    def __init__(self, on_lost: Callable[[Link, str], None], max_unread: int = MAX_UNREAD) -> None:
        self._on_lost = on_lost
        self._max_unread = max_unread
        self._links: dict[ReplyTo, Link] = {}
        self._opening: dict[ReplyTo, asyncio.Future[Link]] = {}

    async def get(self, reply_to: ReplyTo) -> Link:
        """The link to `reply_to`, connected if need be. Raises OSError if the Api replica cannot be reached."""
        link = self._links.get(reply_to)
        if link is not None:
            return link
        opening = self._opening.get(reply_to)
        if opening is None:
            opening = self._opening[reply_to] = asyncio.ensure_future(self._open(reply_to))
        # shielded: others may wait for the same connection when this caller is cancelled
        return await asyncio.shield(opening)

    def close(self) -> None:
        for link in [*self._links.values()]:
            link.close()
        self._links.clear()
        for opening in self._opening.values():
            opening.cancel()

    async def _open(self, reply_to: ReplyTo) -> Link:
        link = Link(reply_to, self._forget, self._max_unread)
        loop = asyncio.get_running_loop()
        connecting = loop.create_connection(lambda: link, reply_to.host, reply_to.port)
        try:
            await asyncio.wait_for(connecting, CONNECT_TIMEOUT_S)
        except asyncio.TimeoutError:
            raise OSError(f"no connection within {CONNECT_TIMEOUT_S:g} s") from None
        finally:
            del self._opening[reply_to]
        self._links[reply_to] = link
        return link

    def _forget(self, link: Link, reason: str) -> None:
        if self._links.get(link.reply_to) is link:
            del self._links[link.reply_to]
        log.warning("dropping the Api replica at %s:%d: %s", link.reply_to.host, link.reply_to.port, reason)
        self._on_lost(link, reason)
