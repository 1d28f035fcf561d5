"""The body of POST /v1/messages (Anthropic's Messages API, text only) → a chat request."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictStr, WithJsonSchema

from deployments.protocol.errors import bad_request
from deployments.protocol.limits import Limits
from deployments.protocol.requests import ChatRequest, Message, SamplingRequest, parse_fields
from deployments.protocol.validation import json_type
from deployments.protocol.values import Float, Int, as_stops

_BLOCK_SCHEMA = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}
_BLOCKS_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": _BLOCK_SCHEMA}]}
Blocks = Annotated[Any, WithJsonSchema(_BLOCKS_SCHEMA)]


class AnthropicMessage(BaseModel):
    model_config = ConfigDict(extra="ignore")

    role: Literal["user", "assistant"]
    content: Blocks


class AnthropicRequest(SamplingRequest):
    """`max_tokens` is required, `stop_sequences` are `stop`; a last message of the assistant is continued."""

    model: StrictStr
    messages: Annotated[list[AnthropicMessage], Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[Int, Field(ge=1)]
    system: Blocks = None
    stop_sequences: Annotated[list[str], BeforeValidator(as_stops)] = []
    temperature: Annotated[Float, Field(ge=0, le=1)] = 1.0
    chat_template_kwargs: dict[str, Any] = {}


def parse_anthropic(body: dict[str, Any], limits: Limits) -> tuple[ChatRequest, list[str]]:
    """The validated request as a chat request, and the names of unknown fields. Raises ApiError 400."""
    request, unknown = parse_fields(AnthropicRequest, "messages", body)
    stops = request.stop_sequences
    if len(stops) > limits.max_stop_strings:
        raise bad_request(
            f"Invalid 'stop_sequences': at most {limits.max_stop_strings} are possible, but got {len(stops)}.",
            param="stop_sequences",
            code="array_above_max_length",
        )
    messages = [] if request.system is None else [Message(role="system", content=_text(request.system, "system"))]
    messages += [
        Message(role=message.role, content=_text(message.content, f"messages[{i}].content"))
        for i, message in enumerate(request.messages)
    ]
    chat = ChatRequest.model_construct(
        **{name: getattr(request, name) for name in SamplingRequest.model_fields},
        messages=messages,
        max_tokens=request.max_tokens,
        stop=stops,
        continue_final_message=messages[-1].role == "assistant",
        chat_template_kwargs=request.chat_template_kwargs,
    )
    return chat, unknown


def _text(content: Any, path: str) -> str:
    """A string, or text blocks joined by newlines. Raises ApiError 400."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(
            f"Invalid type for '{path}': expected a string or an array of blocks, but got {json_type(content)} instead.",
            param=path,
            code="invalid_type",
        )
    texts = []
    for i, block in enumerate(content):
        text = block.get("text") if isinstance(block, dict) and block.get("type") == "text" else None
        if not isinstance(text, str):
            raise bad_request(
                "Unsupported content block: this server's models take blocks of type 'text' only.",
                param=f"{path}[{i}]",
                code="unsupported_content_part",
            )
        texts.append(text)
    return "\n".join(texts)
