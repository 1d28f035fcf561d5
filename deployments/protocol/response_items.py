"""Output items of POST /v1/responses: messages and calls of functions, in the order of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deployments.protocol.responses import Head
from deployments.tools.pieces import Block, Call


def item_id(head: Head, kind: str, index: int) -> str:
    """kind: msg or fc; index: of the item in the output."""
    return f"{kind}_{head.id.removeprefix('resp_')}" + (f"_{index}" if index else "")


def message(item_id: str, status: str, text: str | None) -> dict[str, Any]:
    """None: its content has not begun."""
    content = [] if text is None else [text_part(text)]
    return {"id": item_id, "type": "message", "status": status, "role": "assistant", "content": content}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def function_call(item_id: str, status: str, call: Call) -> dict[str, Any]:
    return {"id": item_id, "type": "function_call", "status": status, "call_id": call.id, "name": call.name,
            "arguments": call.arguments}  # fmt: skip


def status_of(finish: str | None) -> str:
    return "incomplete" if finish == "length" else "completed"


def items(head: Head, blocks: Sequence[Block], finish: str | None) -> list[dict[str, Any]]:
    """The output of an answer; one without anything has an empty message."""
    found: list[dict[str, Any]] = []
    for index, block in enumerate(blocks or [""]):
        if isinstance(block, Call):
            found.append(function_call(item_id(head, "fc", index), "completed" if block.is_whole else "incomplete", block))
        else:
            status = status_of(finish) if index == len(blocks or [""]) - 1 else "completed"
            found.append(message(item_id(head, "msg", index), status, block))
    return found
