"""Answers of POST /v1/responses: the response object, and the typed events of a streamed one.

Each event has its type as SSE's `event` and in the data, with a growing `sequence_number`; there is no [DONE].
"""

from __future__ import annotations

from typing import Any

import orjson

from deployments.protocol import response_items as items
from deployments.protocol.errors import ApiError
from deployments.protocol.events import CallPiece
from deployments.protocol.response_request import ResponseRequest
from deployments.protocol.responses import Head, Usage
from deployments.tools.pieces import Call, CallBegun, CallEnded


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
        "parallel_tool_calls": request.parallel_tool_calls,
        "previous_response_id": None,
        "reasoning": {"effort": request.reasoning and request.reasoning.effort, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": request.temperature,
        "text": {"format": request.text.format.said() if request.text and request.text.format else {"type": "text"}},
        "tool_choice": request.tool_choice.flat(),
        "tools": [{**tool.model_dump(), "strict": bool(tool.strict)} for tool in request.tools],
        "top_logprobs": 0,
        "top_p": request.top_p,
        "truncation": "disabled",
        "usage": None if usage is None else _usage(usage),
    }


class ResponseEvents:
    """Event bytes of one streamed response. An output item begins with its first text, or its call, and ends with what
    follows. `closing` and `failed` end the response.
    """

    def __init__(self, head: Head, request: ResponseRequest) -> None:
        self._head = head
        self._request = request
        self._sequence = 0
        self._output: list[dict[str, Any]] = []  # items that have ended
        self._item: list[str] | Call | None = None  # what has arrived of the one that has not
        self._is_open = False
        self._finish: str | None = None

    def open(self, usage: Usage | None = None) -> bytes:
        self._is_open = True
        begun = {"response": response(self._head, self._request, "in_progress", [])}
        return self._event("response.created", begun) + self._event("response.in_progress", begun)

    def text(self, text: str, logprobs: dict[str, Any] | None = None, usage: Usage | None = None) -> bytes:
        before = b""
        if not isinstance(self._item, list):
            before = self._end_item("completed") + self._begin_message()
        assert isinstance(self._item, list)
        self._item.append(text)
        return before + self._event("response.output_text.delta", {**self._text_place(), "delta": text, "logprobs": []})

    def call(self, piece: CallPiece, logprobs: dict[str, Any] | None = None, usage: Usage | None = None) -> bytes:
        if isinstance(piece, CallBegun):
            before = self._end_item("completed")
            self._item = Call(piece.id, piece.name)
            item = items.function_call(self._id("fc"), "in_progress", self._item)
            return before + self._event("response.output_item.added", {"output_index": len(self._output), "item": item})
        assert isinstance(self._item, Call)
        if isinstance(piece, CallEnded):
            self._item.is_whole = True
            return self._end_item("completed")
        self._item.arguments += piece.text
        return self._event("response.function_call_arguments.delta", {**self._place("fc"), "delta": piece.text})

    def finish(self, reason: str, stop_reason: str | int | None, usage: Usage | None = None) -> bytes:
        self._finish = reason
        before = b"" if self._output or self._item is not None else self._begin_message()
        return before + self._end_item(items.status_of(reason))

    def closing(self, usage: Usage) -> bytes:
        """The last event of a response that ended well."""
        status = items.status_of(self._finish)
        whole = response(self._head, self._request, status, self._output, usage)
        return self._event(f"response.{status}", {"response": whole})

    def failed(self, error: ApiError, usage: Usage) -> bytes:
        """The last events of one that did not; before them, those of its beginning if nothing was sent but heartbeats."""
        begin = b"" if self._is_open else self.open()
        output = self._output + ([] if self._item is None else [self._current("incomplete")])
        failure = response(self._head, self._request, "failed", output, usage, error)
        return begin + self._event("response.failed", {"response": failure})

    def _begin_message(self) -> bytes:
        self._item = []
        item = items.message(self._id("msg"), "in_progress", None)
        return (self._event("response.output_item.added", {"output_index": len(self._output), "item": item})
                + self._event("response.content_part.added", {**self._text_place(), "part": items.text_part("")}))  # fmt: skip

    def _end_item(self, status: str) -> bytes:
        """status: of a message; a call is complete if its arguments are."""
        if self._item is None:
            return b""
        if isinstance(self._item, Call):
            item = self._current("completed" if self._item.is_whole else "incomplete")
            done = self._event("response.function_call_arguments.done",
                               {**self._place("fc"), "name": item["name"], "arguments": item["arguments"]})  # fmt: skip
        else:
            item, text = self._current(status), "".join(self._item)
            done = self._event("response.output_text.done", {**self._text_place(), "text": text, "logprobs": []})
            done += self._event("response.content_part.done", {**self._text_place(), "part": items.text_part(text)})
        done += self._event("response.output_item.done", {"output_index": len(self._output), "item": item})
        self._output.append(item)
        self._item = None
        return done

    def _current(self, status: str) -> dict[str, Any]:
        if isinstance(self._item, Call):
            return items.function_call(self._id("fc"), status, self._item)
        return items.message(self._id("msg"), status, "".join(self._item or []))

    def _id(self, kind: str) -> str:
        return items.item_id(self._head, kind, len(self._output))

    def _place(self, kind: str) -> dict[str, Any]:
        return {"item_id": self._id(kind), "output_index": len(self._output)}

    def _text_place(self) -> dict[str, Any]:
        return {**self._place("msg"), "content_index": 0}

    def _event(self, kind: str, content: dict[str, Any]) -> bytes:
        data = orjson.dumps({"type": kind, "sequence_number": self._sequence, **content})
        self._sequence += 1
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
