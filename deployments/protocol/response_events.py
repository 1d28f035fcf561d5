"""Answers of POST /v1/responses: the response object, and the typed events of a streamed one.

Each event has its type as SSE's `event` and in the data, with a growing `sequence_number`; there is no [DONE].
"""

from __future__ import annotations

from typing import Any

import orjson

from deployments.protocol.errors import ApiError
from deployments.protocol.response_request import ResponseRequest
from deployments.protocol.responses import Head, Usage


def response(
    head: Head,
    request: ResponseRequest,
    status: str,
    output: list[dict[str, Any]],
    usage: Usage | None = None,
    error: ApiError | None = None,
) -> dict[str, Any]:
    """status: in_progress, completed, incomplete (max_output_tokens or the context ended it) or failed."""
    return {
        "id": head.id,
        "object": "response",
        "created_at": head.created,
        "status": status,
        "background": False,
        "error": None if error is None else {"code": "server_error", "message": error.message},
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": None,
        "metadata": request.metadata,
        "model": head.model,
        "output": output,
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": request.reasoning and request.reasoning.effort, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": request.temperature,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": request.top_p,
        "truncation": "disabled",
        "usage": None if usage is None else _usage(usage),
    }


def message(item_id: str, status: str, text: str | None) -> dict[str, Any]:
    """An output item; None: its content has not begun."""
    content = [] if text is None else [_part(text)]
    return {"id": item_id, "type": "message", "status": status, "role": "assistant", "content": content}


def status_of(finish: str | None) -> str:
    return "incomplete" if finish == "length" else "completed"


class ResponseEvents:
    """Event bytes of one streamed response. `closing` and `failed` end it."""

    def __init__(self, head: Head, request: ResponseRequest) -> None:
        self._head = head
        self._request = request
        self._item_id = "msg_" + head.id.removeprefix("resp_")
        self._place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        self._sequence = 0
        self._texts: list[str] = []
        self._is_open = False
        self._finish: str | None = None

    def open(self) -> bytes:
        self._is_open = True
        begun = {"response": response(self._head, self._request, "in_progress", [])}
        return b"".join((
            self._event("response.created", begun),
            self._event("response.in_progress", begun),
            self._event("response.output_item.added",
                        {"output_index": 0, "item": message(self._item_id, "in_progress", None)}),
            self._event("response.content_part.added", {**self._place, "part": _part("")}),
        ))  # fmt: skip

    def text(self, text: str, logprobs: dict[str, Any] | None = None, usage: Usage | None = None) -> bytes:
        self._texts.append(text)
        return self._event("response.output_text.delta", {**self._place, "delta": text, "logprobs": []})

    def finish(self, reason: str, stop_reason: str | int | None, usage: Usage | None = None) -> bytes:
        self._finish = reason
        text = "".join(self._texts)
        item = message(self._item_id, status_of(reason), text)
        return b"".join((
            self._event("response.output_text.done", {**self._place, "text": text, "logprobs": []}),
            self._event("response.content_part.done", {**self._place, "part": _part(text)}),
            self._event("response.output_item.done", {"output_index": 0, "item": item}),
        ))  # fmt: skip

    def closing(self, usage: Usage) -> bytes:
        """The last event of a response that ended well."""
        status = status_of(self._finish)
        output = [message(self._item_id, status, "".join(self._texts))]
        return self._event(f"response.{status}",
                           {"response": response(self._head, self._request, status, output, usage)})  # fmt: skip

    def failed(self, error: ApiError, usage: Usage) -> bytes:
        """The last events of one that did not; before them, those of its beginning if nothing was sent but heartbeats."""
        begin = b"" if self._is_open else self.open()
        output = [message(self._item_id, "incomplete", "".join(self._texts))]
        failure = response(self._head, self._request, "failed", output, usage, error)
        return begin + self._event("response.failed", {"response": failure})

    def _event(self, kind: str, content: dict[str, Any]) -> bytes:
        data = orjson.dumps({"type": kind, "sequence_number": self._sequence, **content})
        self._sequence += 1
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
