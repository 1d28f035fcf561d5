"""Token frames between a model replica and an Api replica: framing, encoding, and every bound a reader enforces.

A frame is a 4-byte little-endian length and that many bytes of msgpack. The first frame of a connection is the hello
[MAGIC, secret]; every later one is [seq, [event, ...]] with seq = 0, 1, 2, ... and

    event = [rid, token_ids, finish, extra]     extra = None or [logprobs, error, cached_tokens, waits, prompt]
    prompt = None or [count, own, ranks, top_ids, top_logprobs]: little-endian float32 and int32 as bytes

One frame carries all events that one engine step made for one Api replica, but for those with `prompt`, which have one each.
msgpack, because a socket that reads pickle
runs whatever a stranger sends to it; bounded, because a length is the first thing a stranger would lie about.
"""

from __future__ import annotations

import asyncio
import hmac
import struct
import sys
from array import array
from collections.abc import Callable
from typing import Any, cast

import msgpack

from model_core.engine.request import PromptLogprobs, TokenEvent, TokenLogprobs
from model_core.errors import MiniLLMError

MAGIC = "mini-llm-tokens/3"
MAX_HELLO = 256
MAX_FRAME = 8 << 20  # 512 sequences with 100 alternatives each are 0.8 MB
FINISHES = frozenset({None, "stop", "length", "abort", "error"})

_length = struct.Struct("<I")
_SWAPPED = sys.byteorder == "big"
_pack = msgpack.Packer(use_bin_type=True).pack  # reused: a new Packer per frame costs 1.5 us more


class WireError(MiniLLMError):
    """The peer sent something that is not this protocol; its connection is closed."""


def pack_frame(content: Any) -> bytes:
    """The bytes of one frame. Raises WireError if it is larger than any reader accepts."""
    body = _pack(content)
    if len(body) > MAX_FRAME:
        raise WireError(f"a frame of {len(body)} bytes is over the limit of {MAX_FRAME}")
    return _length.pack(len(body)) + body


def encode_event(rid: int, event: TokenEvent) -> list[Any]:
    """msgpack-ready form of an event under the number `rid` that the Api replica gave its request."""
    _, ids, finish, logprobs, error, cached, waits, prompt = event
    if logprobs is None and error is None and waits is None and prompt is None and not cached:
        return [rid, ids, finish, None]
    return [rid, ids, finish, [logprobs, error, cached, waits, None if prompt is None else _encode_prompt(prompt)]]


def decode_event(request_id: str, ids: Any, finish: Any, extra: Any) -> TokenEvent:
    """The event, checked. Raises WireError."""
    if type(ids) is not list or finish not in FINISHES:
        raise WireError(f"not an event: finish {finish!r}, token ids {type(ids).__name__}")
    for token in ids:
        if type(token) is not int:
            raise WireError(f"not a token id: {token!r}")
    if extra is None:
        return TokenEvent(request_id, ids, finish)
    try:
        logprobs, error, cached, waits, prompt = extra
        if logprobs is not None:
            logprobs = [TokenLogprobs(float(own), [(int(i), float(p)) for i, p in top]) for own, top in logprobs]
        if waits is not None:
            queued, computed = waits
            waits = float(queued), float(computed)
        if prompt is not None:
            prompt = _decode_prompt(*prompt)
        return TokenEvent(request_id, ids, finish, logprobs, None if error is None else str(error), int(cached), waits, prompt)
    except (TypeError, ValueError) as error:
        raise WireError(f"not the extra part of an event: {error}") from None


def _encode_prompt(prompt: PromptLogprobs) -> list[Any]:
    return [prompt.count, *(_swapped(column).tobytes() for column in prompt[1:])]


def _decode_prompt(count: Any, *columns: Any) -> PromptLogprobs:
    own, ranks, top_ids, top_logprobs = (_swapped(array(kind, data)) for kind, data in zip("fiif", columns, strict=True))
    if not len(own) == len(ranks) or not len(top_ids) == len(top_logprobs) == len(own) * count:
        raise ValueError("prompt log-probabilities of different lengths")
    return PromptLogprobs(count, own, ranks, top_ids, top_logprobs)


def _swapped(column: Any) -> Any:
    """A column in the other form, this machine's or the wire's."""
    if _SWAPPED:
        column = column[:]
        column.byteswap()
    return column


def pack_events(events: list[TokenEvent]) -> bytes:
    """Events of one request, for a carrier that frames them itself (the `handle` transport)."""
    return _pack([encode_event(0, event) for event in events])


def unpack_events(request_id: str, data: bytes) -> list[TokenEvent]:
    """The inverse of pack_events. Raises WireError."""
    try:
        return [decode_event(request_id, *event[1:]) for event in _unpack(data)]
    except (TypeError, ValueError) as error:
        raise WireError(f"not a list of events: {error}") from None


def _unpack(body: bytes | memoryview) -> Any:
    # the limits of unpackb default to the length of its input; ids of msgpack's integer type keep tuples out
    return msgpack.unpackb(body, raw=False, strict_map_key=True, use_list=True)


class FrameProtocol(asyncio.Protocol):
    """The reading end of a connection: splits the stream into frames and checks the hello.

    secret: what the hello must carry. on_frame(events) gets the raw events of each frame, in order. on_close(error) is
    called once, with what was wrong or None for a connection that merely ended; not before a hello was accepted.
    hello_timeout_s: a connection that says nothing is closed after that.
    """

    def __init__(
        self,
        secret: bytes,
        on_open: Callable[[FrameProtocol], None],
        on_frame: Callable[[FrameProtocol, list[Any]], None],
        on_close: Callable[[FrameProtocol, Exception | None], None],
        hello_timeout_s: float = 5.0,
    ) -> None:
        self._secret = secret
        self._on_open, self._on_frame, self._on_close = on_open, on_frame, on_close
        self._buffer = bytearray()
        self._accepted = False
        self._next = 0  # sequence number of the next frame
        self._error: Exception | None = None
        self._hello_timeout_s = hello_timeout_s
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's transports are no subclass of it
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(self._hello_timeout_s, self._fail, WireError("no hello"))

    def connection_lost(self, error: Exception | None) -> None:
        self._deadline.cancel()
        if self._accepted:
            self._accepted = False
            self._on_close(self, self._error or error)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        try:
            self._read_frames()
        except WireError as error:
            self._fail(error)

    def _read_frames(self) -> None:
        buffer, start = self._buffer, 0
        while len(buffer) - start >= 4 and self._error is None:
            (size,) = _length.unpack_from(buffer, start)
            limit = MAX_FRAME if self._accepted else MAX_HELLO
            if size > limit:
                raise WireError(f"a frame of {size} bytes is over the limit of {limit}")
            end = start + 4 + size
            if len(buffer) < end:
                break
            try:
                content = _unpack(bytes(buffer[start + 4 : end]))
            except Exception as error:  # msgpack raises ValueError and several classes of its own
                raise WireError(f"a frame is not msgpack: {type(error).__name__}") from None
            start = end
            self._read(content)
        del buffer[:start]

    def _read(self, content: Any) -> None:
        if type(content) is not list or len(content) != 2:
            raise WireError("a frame is not a pair")
        first, second = content
        if not self._accepted:
            if first != MAGIC or type(second) is not bytes or not hmac.compare_digest(second, self._secret):
                raise WireError("the hello is not ours")
            self._accepted = True
            self._deadline.cancel()
            self._on_open(self)
            return
        if first != self._next or type(second) is not list:
            raise WireError(f"frame {first!r} came where {self._next} was due")
        self._next += 1
        self._on_frame(self, second)

    def _fail(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
            if self.transport is not None:
                self.transport.abort()
