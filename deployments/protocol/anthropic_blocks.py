"""Content blocks of POST /v1/messages → messages of a chat: text, calls of tools (tool_use) and their results."""

from __future__ import annotations

from typing import Any

import orjson

from deployments.protocol.errors import ApiError, bad_request
from deployments.protocol.requests import FunctionCall, Message, ToolCall
from deployments.protocol.validation import json_type

BLOCKS_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"anyOf": [
    {"type": "object", "required": ["type", "text"], "properties": {"type": {"const": "text"}, "text": {"type": "string"}}},
    {"type": "object", "required": ["type", "id", "name", "input"],
     "properties": {"type": {"const": "tool_use"}, "id": {"type": "string"}, "name": {"type": "string"},
                    "input": {"type": "object"}}},
    {"type": "object", "required": ["type", "tool_use_id"],
     "properties": {"type": {"const": "tool_result"}, "tool_use_id": {"type": "string"},
                    "is_error": {"type": "boolean"}}},
    {"type": "object", "required": ["type"], "properties": {"type": {"enum": ["thinking", "redacted_thinking"]}}},
]}}]}  # fmt: skip


_THOUGHTS = ("thinking", "redacted_thinking")  # of another model in an earlier turn: as at Anthropic without thinking, left out


def chat_messages(messages: list[Any]) -> list[Message]:
    """messages: {role, content} each. A result becomes a message of its own, before or after the text beside it as it stands
    there. Raises ApiError 400.
    """
    calls: set[str] = set()
    found: list[Message] = []
    for i, message in enumerate(messages):
        path = f"messages[{i}].content"
        if isinstance(message.content, str):
            found.append(Message(role=message.role, content=message.content))
        elif message.role == "system":
            found.append(Message(role="system", content=text_of(message.content, path)))
        elif message.role == "assistant":
            found.append(_of_assistant(_blocks(message.content, path), path, calls))
        else:
            found += _of_user(_blocks(message.content, path), path, calls)
    found = _combined(found)
    if found[-1].tool_calls:
        raise bad_request("The last message calls a tool: its result is missing.", param="messages")
    return found


def _combined(messages: list[Message]) -> list[Message]:
    """Turns of one role after each other are one turn, as at Anthropic: some models' templates refuse two."""
    found: list[Message] = []
    for message in messages:
        last = found[-1] if found else None
        if last is None or message.role not in ("user", "assistant") or message.role != last.role:
            found.append(message)
            continue
        last.content = "\n".join(text for text in (last.content, message.content) if text)
        last.tool_calls = [*(last.tool_calls or []), *(message.tool_calls or [])] or None
    return found


def text_of(content: Any, path: str) -> str:
    """A string, or text blocks joined by newlines. Raises ApiError 400."""
    if isinstance(content, str):
        return content
    texts = []
    for i, block in enumerate(_blocks(content, path)):
        if block.get("type") != "text":
            raise _unsupported(f"{path}[{i}]", "text")
        texts.append(_field(block, "text", str, f"{path}[{i}]"))
    return "\n".join(texts)


def _of_assistant(blocks: list[dict[str, Any]], path: str, calls: set[str]) -> Message:
    texts, made = [], []
    for i, block in enumerate(blocks):
        where = f"{path}[{i}]"
        if block.get("type") == "text":
            texts.append(_field(block, "text", str, where))
        elif block.get("type") == "tool_use":
            id, name = _field(block, "id", str, where), _field(block, "name", str, where)
            given = orjson.dumps(_field(block, "input", dict, where)).decode()
            made.append(ToolCall(id=id, function=FunctionCall(name=name, arguments=given)))
            calls.add(id)
        elif block.get("type") not in _THOUGHTS:
            raise _unsupported(where, "text or tool_use")
    return Message(role="assistant", content="\n".join(texts), tool_calls=made or None)


def _of_user(blocks: list[dict[str, Any]], path: str, calls: set[str]) -> list[Message]:
    found: list[Message] = []
    texts: list[str] = []
    for i, block in enumerate(blocks):
        where = f"{path}[{i}]"
        if block.get("type") == "text":
            texts.append(_field(block, "text", str, where))
        elif block.get("type") == "tool_result":
            if texts:
                found.append(Message(role="user", content="\n".join(texts)))
                texts = []
            found.append(_result(block, where, calls))
        else:
            raise _unsupported(where, "text or tool_result")
    return [*found, Message(role="user", content="\n".join(texts))] if texts or not found else found


def _result(block: dict[str, Any], path: str, calls: set[str]) -> Message:
    id = _field(block, "tool_use_id", str, path)
    if id not in calls:
        raise bad_request("A tool_result must follow the tool_use that has its id.", param=f"{path}.tool_use_id")
    content = block.get("content")
    text = "" if content is None else text_of(content, f"{path}.content")
    is_error = block.get("is_error") is not None and _field(block, "is_error", bool, path)
    return Message(role="tool", tool_call_id=id, content=f"Error: {text}" if is_error else text)


def _blocks(content: Any, path: str) -> list[dict[str, Any]]:
    if not isinstance(content, list):
        raise bad_request(
            f"Invalid type for '{path}': expected a string or an array of blocks, but got {json_type(content)} instead.",
            param=path,
            code="invalid_type",
        )
    return [block if isinstance(block, dict) else {} for block in content]


def _field(block: dict[str, Any], name: str, kind: type, path: str) -> Any:
    value = block.get(name)
    if not isinstance(value, kind):
        words = {str: "a string", bool: "a boolean"}.get(kind, "an object")
        raise bad_request(f"Invalid type for '{path}.{name}': expected {words}, but got {json_type(value)} instead.",
                          param=f"{path}.{name}", code="invalid_type")  # fmt: skip
    return value


def _unsupported(path: str, kinds: str) -> ApiError:
    return bad_request(f"Unsupported content block: this server's models take blocks of type {kinds} here.", param=path,
                       code="unsupported_content_part")  # fmt: skip
