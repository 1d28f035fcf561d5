"""The body of POST /v1/responses (OpenAI's Responses API, the part that needs no memory) → a chat request."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, StrictBool, StrictStr, WithJsonSchema
from pydantic_core import PydanticCustomError

from deployments.protocol.errors import bad_request
from deployments.protocol.limits import Limits
from deployments.protocol.requests import (
    ChatRequest,
    FunctionCall,
    Message,
    SamplingRequest,
    ToolCall,
    check_stops,
    parse_fields,
)
from deployments.protocol.structured import TextOptions, one_grammar
from deployments.protocol.tools import MAX_TOOLS, FlatChoice, FlatTool, ToolChoice
from deployments.protocol.validation import expected, json_type
from deployments.protocol.values import STOP_SCHEMA, Effort, Int, Nested, as_stops, part_schema

_TEXT_PARTS = ("input_text", "output_text", "text", "refusal")
_PARTS_SCHEMA = {"type": "array", "items": part_schema("input_text", "output_text", "text")}
_TEXT_SCHEMA = {"anyOf": [{"type": "string"}, _PARTS_SCHEMA]}
_STRING = {"type": "string"}
_CALL = {"call_id": _STRING, "name": _STRING, "arguments": _STRING}
_ROLE = {"enum": ["system", "developer", "user", "assistant"]}
_ITEM_SCHEMA = {"anyOf": [
    {"type": "object", "required": ["role", "content"],
     "properties": {"type": {"enum": ["message", None]}, "role": _ROLE,
                    "content": _TEXT_SCHEMA, **_CALL}},
    {"type": "object", "required": ["type", "call_id", "name", "arguments"],
     "properties": {"type": {"const": "function_call"}, **_CALL, "role": _ROLE}},
    {"type": "object", "required": ["type", "call_id", "output"],
     "properties": {"type": {"const": "function_call_output"}, **_CALL, "role": _ROLE, "output": _TEXT_SCHEMA}},
    {"type": "object", "required": ["type"], "properties": {"type": {"const": "reasoning"}, **_CALL, "role": _ROLE}},
]}  # fmt: skip
_INPUT_SCHEMA = {
    "anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "maxItems": 4096, "items": _ITEM_SCHEMA}]
}


def _item_type(value: Any) -> Any:
    if not isinstance(value, str) or value not in _NEEDED:
        words = "Expected an item of type {known}, but got '{kind}': hosted tools and stored items are not supported"
        raise PydanticCustomError("item_type", words, {"known": ", ".join(map(repr, _NEEDED)), "kind": str(value)[:40]})
    return value


_NEEDED = {"message": ("role", "content"), "function_call": ("call_id", "name", "arguments"),
           "function_call_output": ("call_id", "output"), "reasoning": ()}  # fmt: skip


class InputItem(Nested):
    """A message of the conversation, a call of a function in it, the result of one, or what another model thought."""

    model_config = ConfigDict(extra="ignore")

    type: Annotated[Literal["message", "function_call", "function_call_output", "reasoning"],
                    BeforeValidator(_item_type)] = "message"  # fmt: skip
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Any = None
    call_id: StrictStr | None = None
    name: StrictStr | None = None
    arguments: StrictStr | None = None
    output: Any = None


class Reasoning(Nested):
    model_config = ConfigDict(extra="ignore")

    effort: Effort | None = None


def _input(value: Any) -> Any:
    if isinstance(value, str):
        return [InputItem(role="user", content=value)]
    if not isinstance(value, list):
        raise expected("one of a string or array of items", value)
    return value


class ResponseRequest(SamplingRequest):
    input: Annotated[
        list[InputItem], BeforeValidator(_input), Field(min_length=1, max_length=4096), WithJsonSchema(_INPUT_SCHEMA)
    ]
    instructions: StrictStr | None = None
    max_output_tokens: Annotated[Int, Field(ge=1)] | None = None
    stop: Annotated[list[str], BeforeValidator(as_stops), WithJsonSchema(STOP_SCHEMA)] = []
    metadata: Annotated[dict[StrictStr, StrictStr], Field(max_length=16)] = {}
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    tools: Annotated[list[FlatTool], Field(max_length=MAX_TOOLS)] = []
    tool_choice: FlatChoice = ToolChoice("auto")
    parallel_tool_calls: StrictBool = True
    chat_template_kwargs: dict[str, Any] = {}


def parse_response(body: dict[str, Any], limits: Limits) -> tuple[ResponseRequest, ChatRequest, list[str]]:
    """The validated request, the same as a chat request, and the names of unknown fields. Raises ApiError 400."""
    request, unknown = parse_fields(ResponseRequest, "responses", body)
    check_stops(request.stop, limits)
    messages = [Message(role="system", content=request.instructions)] if request.instructions else []
    messages += _messages(request.input)
    shared = {name: getattr(request, name) for name in SamplingRequest.model_fields}
    chat = ChatRequest.model_construct(
        **shared, messages=messages, tools=[tool.nested() for tool in request.tools], tool_choice=request.tool_choice,
        parallel_tool_calls=request.parallel_tool_calls, max_completion_tokens=request.max_output_tokens,
        stop=request.stop, reasoning_effort=request.reasoning and request.reasoning.effort,
        chat_template_kwargs=request.chat_template_kwargs,
    )  # fmt: skip
    form = request.text and request.text.format
    chat.held_to(one_grammar(**{"text.format": form, "structured_outputs": request.structured_outputs}))
    return request, chat, unknown


def _messages(items: list[InputItem]) -> list[Message]:
    """Calls belong to the assistant's message before them, if there is one; reasoning is not shown to models. Raises ApiError
    400."""
    messages: list[Message] = []
    calls: set[str] = set()
    for i, item in enumerate(items):
        path = f"input[{i}]"
        for name in _NEEDED[item.type]:
            if getattr(item, name) is None:
                where = f"{path}.{name}"
                raise bad_request(f"Missing required parameter: '{where}'.", param=where, code="missing_required_parameter")
        if item.type == "reasoning":
            continue
        if item.type == "message":
            messages.append(Message(role=item.role, content=_text(item.content, f"{path}.content")))  # type: ignore[arg-type]
        elif item.type == "function_call":
            call = ToolCall(id=str(item.call_id), function=FunctionCall(name=str(item.name), arguments=str(item.arguments)))
            calls.add(call.id)
            if not messages or messages[-1].role != "assistant":
                messages.append(Message(role="assistant"))
            messages[-1].tool_calls = [*(messages[-1].tool_calls or []), call]
        elif item.call_id not in calls:
            raise bad_request("A function_call_output must follow the function_call that has its call_id.",
                              param=f"{path}.call_id")  # fmt: skip
        else:
            messages.append(Message(role="tool", tool_call_id=item.call_id, content=_text(item.output, f"{path}.output")))
    if not messages:
        raise bad_request("Invalid 'input': it has nothing but reasoning, which is not shown to models.", param="input")
    return messages


def _text(content: Any, path: str) -> str:
    """Text, or parts of it, which are joined by newlines as those of chat messages. Raises ApiError 400."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(
            f"Invalid type for '{path}': expected one of a string or array of content parts, "
            f"but got {json_type(content)} instead.",
            param=path,
            code="invalid_type",
        )
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or kind not in _TEXT_PARTS:
            raise bad_request(
                "Unsupported content part: this server's models take text parts only (input_text, output_text).",
                param=f"{path}[{i}]",
                code="unsupported_content_part",
            )
        name = "refusal" if kind == "refusal" else "text"
        if not isinstance(part.get(name), str):
            where = f"{path}[{i}].{name}"
            raise bad_request(f"Invalid type for '{where}': expected a string, but got {json_type(part.get(name))} instead.",
                              param=where, code="invalid_type")  # fmt: skip
        texts.append(part[name])
    return "\n".join(texts)
