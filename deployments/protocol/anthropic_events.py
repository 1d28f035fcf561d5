"""Answers of POST /v1/messages: the message object, the events of a streamed one, and Anthropic's error envelope."""

from __future__ import annotations

from typing import Any

import orjson

from deployments.protocol.errors import ApiError
from deployments.protocol.responses import Head, Usage

_ERROR_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip


def error_body(error: ApiError, request_id: str) -> bytes:
    """The envelope: {"type": "error", "error": {type, message}, "request_id"}."""
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


def text_block(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


class AnthropicEvents:
    """Event bytes of one streamed message; prompt_tokens: of its prompt."""

    def __init__(self, head: Head, prompt_tokens: int) -> None:
        self._head = head
        self._prompt_tokens = prompt_tokens
        self._reason: dict[str, Any] = {}

    def open(self) -> bytes:
        begun = message(self._head, [], Usage(self._prompt_tokens, 0, 0), None, None)
        return (_event("message_start", {"message": begun})
                + _event("content_block_start", {"index": 0, "content_block": text_block("")}))  # fmt: skip

    def text(self, text: str, logprobs: dict[str, Any] | None = None, usage: Usage | None = None) -> bytes:
        return _event("content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": text}})

    def finish(self, reason: str, stop_reason: str | int | None, usage: Usage | None = None) -> bytes:
        self._reason = _stop(reason, stop_reason)
        return _event("content_block_stop", {"index": 0})

    def closing(self, usage: Usage) -> bytes:
        """The last events of a message that ended well."""
        return _event("message_delta", {"delta": self._reason, "usage": _usage(usage)}) + _event("message_stop", {})


def error_event(error: ApiError) -> bytes:
    """The last event of one that did not."""
    return _event("error", {"error": _error(error)["error"]})


def _event(kind: str, content: dict[str, Any]) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps({"type": kind, **content}) + b"\n\n"


def _error(error: ApiError) -> dict[str, Any]:
    default = "api_error" if error.status >= 500 else "invalid_request_error"
    return {"type": "error", "error": {"type": _ERROR_TYPES.get(error.status, default), "message": error.message}}


def _stop(finish: str | None, stop: str | int | None) -> dict[str, Any]:
    if finish == "stop" and isinstance(stop, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": stop}
    reason = {None: None, "length": "max_tokens"}.get(finish, "end_turn")
    return {"stop_reason": reason, "stop_sequence": None}


def _usage(usage: Usage) -> dict[str, Any]:
    """Anthropic counts tokens read from a cache apart from the others."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
