"""Server-sent events of a streamed answer, as bytes.

Everything of a chunk but the text is the same for a whole stream, so it is built once per choice; a token then costs
one JSON-escaped string between two constants: 0.27 us, against 1.1 us for `orjson.dumps` of the nested chunk (EPYC,
November 2026). Only `data:` lines and comments are ever sent: the official client's decoder dies on a
heartbeat that follows an `id:` or `retry:` line.
"""

from __future__ import annotations

from typing import Any, Protocol

import orjson

from deployments.protocol.responses import Head, Usage
from deployments.tools.pieces import CallBegun, CallEnded, CallText

CallPiece = CallBegun | CallText | CallEnded
DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": keep-alive\n\n"


class Line(Protocol):
    """Writes the events of one choice."""

    def open(self, usage: Usage | None = None) -> bytes:
        """What comes before the first text."""
        ...

    def text(self, text: str, logprobs: dict[str, Any] | None = None, usage: Usage | None = None) -> bytes: ...
    def call(
        self, piece: CallPiece, logprobs: dict[str, Any] | None = None, usage: Usage | None = None
    ) -> bytes:
        """A part of a call of a tool."""
        ...

    def finish(self, reason: str, stop_reason: str | int | None, usage: Usage | None = None) -> bytes:
        """The choice's last events."""
        ...


class ChoiceEvents:
    """Chunk bytes of one choice.

    include_usage: put `"usage": null` (or, if given, the usage so far) into each chunk.
    echo: text that comes before the choice's own.
    prompt_ids: go out with the first chunk; ids: a list that fills as tokens are made, emptied into each chunk.
    prompt: the same of what open() finds in it: `prompt_logprobs`, and `logprobs` of the echo.
    """

    def __init__(
        self,
        head: Head,
        index: int,
        *,
        include_usage: bool,
        echo: str | None = None,
        prompt_ids: list[int] | None = None,
        ids: list[int] | None = None,
        prompt: dict[str, Any] | None = None,
    ) -> None:
        self._echo = echo
        self._prompt = {} if prompt is None else prompt
        self._prompt_ids = prompt_ids
        self._ids = ids
        self._prefix = b"data: " + orjson.dumps(head.json())[:-1] + b',"choices":[{"index":%d,' % index
        self._null_end = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._before = self._prefix + self._text_open
        self._after = self._text_close + b',"logprobs":null,"finish_reason":null}]' + self._null_end

    def open(self, usage: Usage | None = None) -> bytes:
        raise NotImplementedError

    _text_open: bytes
    _text_close: bytes
    _empty: bytes

    def text(self, text: str, logprobs: dict[str, Any] | None = None, usage: Usage | None = None) -> bytes:
        """A chunk with more text, or with other things alone."""
        if logprobs is None and usage is None and self._ids is None:
            return self._before + orjson.dumps(text) + self._after
        return self._chunk(self._text_open + orjson.dumps(text) + self._text_close if text else self._empty, logprobs, usage)

    def call(self, piece: CallPiece, logprobs: dict[str, Any] | None = None, usage: Usage | None = None) -> bytes:
        raise NotImplementedError

    def _chunk(self, content: bytes, logprobs: dict[str, Any] | None, usage: Usage | None) -> bytes:
        return b"".join(
            (
                self._prefix,
                content,
                b',"logprobs":',
                orjson.dumps(logprobs),
                b',"finish_reason":null',
                self._taken(),
                b"}]",
                self._end(usage),
            )
        )

    def finish(self, reason: str, stop_reason: str | int | None, usage: Usage | None = None) -> bytes:
        """The choice's last chunk."""
        reasons = b',"logprobs":null,"finish_reason":%b,"stop_reason":%b%b}]' % (
            orjson.dumps(reason),
            orjson.dumps(stop_reason),
            self._taken(),
        )
        return self._prefix + self._empty + reasons + self._end(usage)

    def _of_the_prompt(self) -> bytes:
        """Fields that were asked for."""
        found = b"" if self._prompt_ids is None else b',"prompt_token_ids":' + orjson.dumps(self._prompt_ids)
        if "prompt_logprobs" in self._prompt:
            found += b',"prompt_logprobs":' + orjson.dumps(self._prompt.pop("prompt_logprobs"))
        return found

    def _taken(self) -> bytes:
        """The ids since the last chunk, as a field of the choice."""
        if self._ids is None:
            return b""
        found = b',"token_ids":' + orjson.dumps(self._ids)
        self._ids.clear()
        return found

    def _end(self, usage: Usage | None) -> bytes:
        return self._null_end if usage is None else b',"usage":' + orjson.dumps(usage.json()) + b"}\n\n"


class ChatEvents(ChoiceEvents):
    """may_call: whether the content may stay null."""

    _text_open = b'"delta":{"content":'
    _text_close = b"}"
    _empty = b'"delta":{}'

    def __init__(self, *args: Any, may_call: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._content = b"null" if may_call else b'""'

    def call(self, piece: CallPiece, logprobs: dict[str, Any] | None = None, usage: Usage | None = None) -> bytes:
        """A call's id and name, or more of its arguments. Its end is not said in this API."""
        if isinstance(piece, CallEnded):
            return b"" if logprobs is None else self._chunk(self._empty, logprobs, usage)
        call: dict[str, Any] = {"index": piece.index}
        if isinstance(piece, CallBegun):
            call |= {"id": piece.id, "type": "function", "function": {"name": piece.name, "arguments": ""}}
        else:
            call["function"] = {"arguments": piece.text}
        return self._chunk(b'"delta":' + orjson.dumps({"tool_calls": [call]}), logprobs, usage)

    def open(self, usage: Usage | None = None) -> bytes:
        """The first chunk of a chat choice: its role, once."""
        delta = b'"delta":{"role":"assistant","content":' + self._content + b'},"logprobs":null,"finish_reason":null}]'
        # what is of the prompt lies beside the choices, as vLLM has it: a chat has one prompt
        return self._prefix + delta + self._of_the_prompt() + self._end(usage)


class TextEvents(ChoiceEvents):
    _text_open = b'"text":'
    _text_close = b""
    _empty = b'"text":""'

    def open(self, usage: Usage | None = None) -> bytes:
        """A chunk with the prompt, if it was asked for in one of both forms."""
        fields = self._of_the_prompt()
        if self._echo is None and not fields:
            return b""
        logprobs = orjson.dumps(self._prompt.pop("logprobs", None))
        text = orjson.dumps(self._echo or "") + b',"logprobs":' + logprobs + b',"finish_reason":null'
        return self._prefix + self._text_open + text + fields + b"}]" + self._end(usage)


def last_event(head: Head, usage: Usage | None, timings: dict[str, Any] | None) -> bytes:
    """The chunk after all choices' last ones, if any of both was asked for: no choices."""
    chunk: dict[str, Any] = {**head.json(), "choices": []}
    if usage is not None:
        chunk["usage"] = usage.json()
    if timings is not None:
        chunk["timings"] = timings
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def error_event(envelope: bytes) -> bytes:
    """An error after the stream began; [DONE] still follows."""
    return b"data: " + envelope + b"\n\n"
