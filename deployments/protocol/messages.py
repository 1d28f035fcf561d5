"""Chat messages as the client sends them → plain dicts for the model's chat template."""

from __future__ import annotations

from typing import Any

import orjson

from deployments.protocol.errors import bad_request
from deployments.protocol.requests import Message
from deployments.protocol.validation import json_type

RESERVED = {"messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize", "bos_token",
            "eos_token", "self"}  # fmt: skip


def for_template(messages: list[Message]) -> list[dict[str, Any]]:
    """Checks what types cannot say and flattens: text parts are joined by newlines (as vLLM does), `developer` becomes
    `system` (its name in every open model's template), arguments of calls become objects. Raises ApiError 400.
    """
    calls: dict[str, str] = {}  # names by id
    return [_one(message, f"messages[{i}]", calls) for i, message in enumerate(messages)]


def _one(message: Message, path: str, calls: dict[str, str]) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": _text(message, path)}
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_calls:
        if role != "assistant":
            raise bad_request(f"Only assistant messages may have tool_calls, not {role}.", param=f"{path}.tool_calls")
        calls.update((call.id, call.function.name) for call in message.tool_calls)
        plain["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
            for call in message.tool_calls
            for arguments in [_arguments(call.function.arguments)]
        ]
    if role == "tool":
        if message.tool_call_id not in calls:
            raise bad_request(
                "A tool message must follow an assistant message whose tool_calls hold its tool_call_id.",
                param=f"{path}.tool_call_id",
            )
        plain["tool_call_id"] = message.tool_call_id
        plain.setdefault("name", calls[str(message.tool_call_id)])  # some templates say whose result it is
    return plain


def _text(message: Message, path: str) -> str:
    content = message.content
    if isinstance(content, str):
        return content
    if content is None:
        if message.role == "assistant" and message.tool_calls:
            return ""
        raise bad_request(
            f"Missing required parameter: '{path}.content'.", param=f"{path}.content", code="missing_required_parameter"
        )
    if not isinstance(content, list):
        raise bad_request(
            f"Invalid type for '{path}.content': expected one of a string or array of content parts, "
            f"but got {json_type(content)} instead.",
            param=f"{path}.content",
            code="invalid_type",
        )
    texts = []
    for i, part in enumerate(content):
        where = f"{path}.content[{i}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "refusal") or (kind == "refusal" and message.role != "assistant"):
            raise bad_request(
                "Unsupported content part: this server's models take parts of type 'text' only.",
                param=where,
                code="unsupported_content_part",
            )
        text = part.get(kind)
        if not isinstance(text, str):
            raise bad_request(
                f"Invalid type for '{where}.{kind}': expected a string, but got {json_type(text)} instead.",
                param=f"{where}.{kind}",
                code="invalid_type",
            )
        texts.append(text)
    return "\n".join(texts)


def _arguments(text: str) -> Any:
    """An object, as templates want it. Text that is none stays text: a call that a model broke must not end a conversation."""
    try:
        found = orjson.loads(text or "{}")
    except orjson.JSONDecodeError:
        return text
    return found if isinstance(found, dict) else text


def check_template_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Refuses names that would replace what the server itself passes to the template. Raises ApiError 400."""
    for name in kwargs:
        if name in RESERVED or not name.isidentifier():
            raise bad_request(f"'{name}' cannot be set by 'chat_template_kwargs'.", param="chat_template_kwargs")
    return kwargs
