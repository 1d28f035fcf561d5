"""Answers of /v1/messages: Anthropic's message, the events of a streamed one, and its error envelope."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import NotRequired, TypedDict

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class TextBlock(TypedDict):
    type: Literal["text"]
    text: str


class ToolUseBlock(TypedDict):
    """`input` has the one member INVALID_JSON, a string, where the model wrote no JSON object."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class AnthropicUsage(TypedDict):
    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class AnthropicMessageAnswer(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock | ToolUseBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: AnthropicUsage


class MessageStart(TypedDict):
    type: Literal["message_start"]
    message: AnthropicMessageAnswer


class ContentBlockStart(TypedDict):
    type: Literal["content_block_start"]
    index: int
    content_block: TextBlock | ToolUseBlock


class TextDelta(TypedDict):
    type: Literal["text_delta"]
    text: str


class InputJsonDelta(TypedDict):
    type: Literal["input_json_delta"]
    partial_json: str


class ContentBlockDelta(TypedDict):
    type: Literal["content_block_delta"]
    index: int
    delta: TextDelta | InputJsonDelta


class ContentBlockStop(TypedDict):
    type: Literal["content_block_stop"]
    index: int


class StopDelta(TypedDict):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(TypedDict):
    type: Literal["message_delta"]
    delta: StopDelta
    usage: AnthropicUsage


class MessageStop(TypedDict):
    type: Literal["message_stop"]


class Ping(TypedDict):
    type: Literal["ping"]


class AnthropicErrorDetail(TypedDict):
    """`details` tell Anthropic's clients that the field `thread` is refused."""

    type: str
    message: str
    details: NotRequired[dict[str, Any]]


class AnthropicErrorEvent(TypedDict):
    type: Literal["error"]
    error: AnthropicErrorDetail


class AnthropicError(AnthropicErrorEvent):
    request_id: str


class TokenCount(TypedDict):
    input_tokens: int


AnyMessageEvent = (
    MessageStart
    | ContentBlockStart
    | ContentBlockDelta
    | ContentBlockStop
    | MessageDelta
    | MessageStop
    | Ping
    | AnthropicErrorEvent
)
