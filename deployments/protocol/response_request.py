"""The body of POST /v1/responses (OpenAI's Responses API, the part that needs no memory) → a chat request."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictStr, WithJsonSchema
from pydantic_core import PydanticCustomError

from deployments.protocol.errors import bad_request, unsupported
from deployments.protocol.limits import Limits
from deployments.protocol.requests import ChatRequest, Message, SamplingRequest, parse_fields
from deployments.protocol.validation import expected, json_type
from deployments.protocol.values import Int

_TEXT_PARTS = ("input_text", "output_text", "text", "refusal")
_PARTS_SCHEMA = {"type": "array", "items": {"type": "object", "required": ["type"]}}
_ITEM_SCHEMA = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "type": {"const": "message"},
        "role": {"enum": ["system", "developer", "user", "assistant"]},
        "content": {"anyOf": [{"type": "string"}, _PARTS_SCHEMA]},
    },
}
_INPUT_SCHEMA = {
    "anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "maxItems": 4096, "items": _ITEM_SCHEMA}]
}


class InputItem(BaseModel):
    """One message of the conversation."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Any


class Reasoning(BaseModel):
    model_config = ConfigDict(extra="ignore")

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None


def _input(value: Any) -> Any:
    if isinstance(value, str):
        return [InputItem(role="user", content=value)]
    if not isinstance(value, list):
        raise expected("one of a string or array of items", value)
    for item in value:
        kind = item.get("type") if isinstance(item, dict) else None
        if kind not in (None, "message"):
            words = "Expected items of type 'message', but got '{kind}': tools and stored items are not supported"
            raise PydanticCustomError("item_type", words, {"kind": str(kind)[:40]})
    return value


class ResponseRequest(SamplingRequest):
    input: Annotated[
        list[InputItem], BeforeValidator(_input), Field(min_length=1, max_length=4096), WithJsonSchema(_INPUT_SCHEMA)
    ]
    instructions: StrictStr | None = None
    max_output_tokens: Annotated[Int, Field(ge=1)] | None = None
    metadata: Annotated[dict[StrictStr, StrictStr], Field(max_length=16)] = {}
    reasoning: Reasoning | None = None
    store: StrictBool = False
    chat_template_kwargs: dict[str, Any] = {}


def parse_response(body: dict[str, Any], limits: Limits) -> tuple[ResponseRequest, ChatRequest, list[str]]:
    """The validated request, the same as a chat request, and the names of unknown fields. Raises ApiError 400."""
    request, unknown = parse_fields(ResponseRequest, "responses", body)
    if request.store:
        raise unsupported("store", "Answers are not stored here: send 'store': false, or leave it out.")
    messages = [Message(role="system", content=request.instructions)] if request.instructions else []
    messages += [Message(role=item.role, content=_text(item, f"input[{i}]")) for i, item in enumerate(request.input)]
    shared = {name: getattr(request, name) for name in SamplingRequest.model_fields}
    chat = ChatRequest.model_construct(
        **shared, messages=messages, max_completion_tokens=request.max_output_tokens,
        reasoning_effort=request.reasoning and request.reasoning.effort, chat_template_kwargs=request.chat_template_kwargs,
    )  # fmt: skip
    return request, chat, unknown


def _text(item: InputItem, path: str) -> str:
    """An item's text; its parts are joined by newlines, as those of chat messages. Raises ApiError 400."""
    content = item.content
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(
            f"Invalid type for '{path}.content': expected one of a string or array of content parts, "
            f"but got {json_type(content)} instead.",
            param=f"{path}.content",
            code="invalid_type",
        )
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
        if kind not in _TEXT_PARTS or not isinstance(text, str):
            raise bad_request(
                "Unsupported content part: this server's models take text parts only (input_text, output_text).",
                param=f"{path}.content[{i}]",
                code="unsupported_content_part",
            )
        texts.append(text)
    return "\n".join(texts)
