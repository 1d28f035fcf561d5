"""Answers of POST /v1/messages: the message object, the events of a streamed one, and Anthropic's error envelope."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from deployments.protocol.errors import ApiError
from deployments.protocol.events import CallPiece
from deployments.protocol.responses import Head, Usage
from deployments.tools.pieces import Block, CallBegun, CallEnded

_ERROR_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    408: "timeout_error", 429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip


def error_body(error: ApiError, path: str, request_id: str) -> bytes:
    """Of an answer at this path: Anthropic's envelope {"type": "error", "error": {type, message}, "request_id"} at its routes,
    else OpenAI's."""
    if not path.startswith("/v1/messages"):
        return error.body()
    return orjson.dumps({**_error(error), "request_id": request_id})


def message(
    head: Head, content: list[dict[str, Any]], usage: Usage, finish: str | None, stop: str | int | None
) -> dict[str, Any]:
    """finish: as of a chat choice, None while it is streamed; stop: the stop sequence that ended it."""
    return {
        "id": head.id,
        "type": "message",
        "role": "assistant",
        "model": head.model,
        "content": content,
        **_stop(finish, stop),
        "usage": _usage(usage),
    }


def block(found: Block) -> dict[str, Any]:
    """A text or a call as a content block. Arguments that are no JSON object are wrapped, as Anthropic advises its clients."""
    if isinstance(found, str):
        return {"type": "text", "text": found}
    try:
        given = orjson.loads(found.arguments)
    except orjson.JSONDecodeError:
        given = None
    return _tool_use(found.id, found.name, given if isinstance(given, dict) else {"INVALID_JSON": found.arguments})


def _tool_use(id: str, name: str, given: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": id, "name": name, "input": given}


PING = b'event: ping\ndata: {"type":"ping"}\n\n'  # a heartbeat, but for those before message_start


class AnthropicEvents:
    """Event bytes of one streamed message; usage: tells the tokens so far. A block ends when another thing comes."""

    def __init__(self, head: Head, usage: Callable[[], Usage]) -> None:
        self._head = head
        self._usage = usage
        self._reason: dict[str, Any] = {}
        self._blocks = 0  # that have begun
        self._open: str | None = None  # type of the block that has not ended

    def open(self, usage: Usage | None = None) -> bytes:
        begun = message(self._head, [], self._usage()._replace(completion_tokens=0), None, None)
        return _event("message_start", {"message": begun})

    def text(self, text: str, logprobs: dict[str, Any] | None = None, usage: Usage | None = None) -> bytes:
        before = b"" if self._open == "text" else self._begin(block(""))
        return before + self._delta({"type": "text_delta", "text": text})

    def call(self, piece: CallPiece, logprobs: dict[str, Any] | None = None, usage: Usage | None = None) -> bytes:
        if isinstance(piece, CallBegun):
            return self._begin(_tool_use(piece.id, piece.name, {}))
        if isinstance(piece, CallEnded):
            return self._end()
        return self._delta({"type": "input_json_delta", "partial_json": piece.text})

    def finish(self, reason: str, stop_reason: str | int | None, usage: Usage | None = None) -> bytes:
        self._reason = _stop(reason, stop_reason)
        before = b"" if self._blocks else self._begin(block(""))
        return before + self._end()

    def closing(self, usage: Usage) -> bytes:
        """The last events of a message that ended well."""
        return _event("message_delta", {"delta": self._reason, "usage": _usage(usage)}) + _event("message_stop", {})

    def _begin(self, content: dict[str, Any]) -> bytes:
        before = self._end()
        self._open = content["type"]
        self._blocks += 1
        return before + _event("content_block_start", {"index": self._blocks - 1, "content_block": content})

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", {"index": self._blocks - 1, "delta": delta})

    def _end(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        return _event("content_block_stop", {"index": self._blocks - 1})


def error_event(error: ApiError) -> bytes:
    """The last event of one that did not."""
    return _event("error", {"error": _error(error)["error"]})


def _event(kind: str, content: dict[str, Any]) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps({"type": kind, **content}) + b"\n\n"


def _error(error: ApiError) -> dict[str, Any]:
    """It has no `param`: the message says where, if it does not already. `details` make Anthropic's tool runner go on without
    a thread, with all messages."""
    message = error.message if error.param is None or error.param in error.message else f"{error.param}: {error.message}"
    default = "api_error" if error.status >= 500 else "invalid_request_error"
    said: dict[str, Any] = {"type": _ERROR_TYPES.get(error.status, default), "message": message}
    if error.param == "thread":
        said["details"] = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    return {"type": "error", "error": said}


def _stop(finish: str | None, stop: str | int | None) -> dict[str, Any]:
    if finish == "stop" and isinstance(stop, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": stop}
    reason = {None: None, "length": "max_tokens", "tool_calls": "tool_use"}.get(finish, "end_turn")
    return {"stop_reason": reason, "stop_sequence": None}


def _usage(usage: Usage) -> dict[str, Any]:
    """Anthropic counts tokens read from a cache apart from the others."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
