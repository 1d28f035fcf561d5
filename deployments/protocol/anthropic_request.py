"""The body of POST /v1/messages (Anthropic's Messages API: text and tools) → a chat request."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, StrictBool, StrictStr, WithJsonSchema

from deployments.protocol.anthropic_blocks import BLOCKS_SCHEMA, chat_messages, text_of
from deployments.protocol.errors import bad_request
from deployments.protocol.limits import Limits
from deployments.protocol.requests import ChatRequest, Message, SamplingRequest, check_stops, parse_fields
from deployments.protocol.structured import OutputConfig, one_grammar
from deployments.protocol.tools import MAX_TOOLS, Function, FunctionName, Tool, ToolChoice
from deployments.protocol.values import STOP_SCHEMA, Float, Int, Nested, as_stops

Blocks = Annotated[Any, WithJsonSchema(BLOCKS_SCHEMA)]


class AnthropicMessage(Nested):
    model_config = ConfigDict(extra="ignore")

    role: Literal["user", "assistant", "system"]
    content: Blocks


class AnthropicTool(Nested):
    model_config = ConfigDict(extra="ignore")

    type: Literal["custom"] | None = "custom"
    name: FunctionName
    description: StrictStr | None = None
    input_schema: dict[str, Any]
    strict: StrictBool | None = None


class AnthropicChoice(Nested):
    """name: of the tool, with type `tool`."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["auto", "any", "tool", "none"]
    name: StrictStr | None = None
    disable_parallel_tool_use: StrictBool = False


class AnthropicRequest(SamplingRequest):
    """`max_tokens` is required, `stop_sequences` are `stop`; a last message of the assistant is continued."""

    model: StrictStr
    messages: Annotated[list[AnthropicMessage], Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[Int, Field(ge=1)]
    system: Blocks = None
    stop_sequences: Annotated[list[str], BeforeValidator(as_stops), WithJsonSchema(STOP_SCHEMA)] = []
    temperature: Annotated[Float, Field(ge=0, le=1)] = 1.0
    output_config: OutputConfig = OutputConfig()
    tools: Annotated[list[AnthropicTool], Field(max_length=MAX_TOOLS)] = []
    tool_choice: AnthropicChoice = AnthropicChoice(type="auto")
    chat_template_kwargs: dict[str, Any] = {}


def parse_anthropic(body: dict[str, Any], limits: Limits) -> tuple[ChatRequest, list[str]]:
    """The validated request as a chat request, and the names of unknown fields. Raises ApiError 400."""
    request, unknown = parse_fields(AnthropicRequest, "messages", body)
    check_stops(request.stop_sequences, limits, "stop_sequences")
    messages = [] if request.system is None else [Message(role="system", content=text_of(request.system, "system"))]
    messages += chat_messages(request.messages)
    chat = ChatRequest.model_construct(
        **{name: getattr(request, name) for name in SamplingRequest.model_fields},
        messages=messages,
        max_tokens=request.max_tokens,
        stop=request.stop_sequences,
        tools=[_tool(tool) for tool in request.tools],
        tool_choice=_choice(request.tool_choice),
        parallel_tool_calls=not request.tool_choice.disable_parallel_tool_use,
        continue_final_message=messages[-1].role == "assistant",
        reasoning_effort=request.output_config.effort,
        chat_template_kwargs=request.chat_template_kwargs,
    )
    request.output_config.check("output_config")
    form = request.output_config.format
    chat.held_to(one_grammar(**{"output_config.format": form, "structured_outputs": request.structured_outputs}))
    return chat, unknown


def _tool(tool: AnthropicTool) -> Tool:
    function = Function(name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict)
    return Tool(type="function", function=function)


def _choice(choice: AnthropicChoice) -> ToolChoice:
    if choice.type == "none" or choice.type == "auto":
        return ToolChoice(choice.type)
    if choice.type == "any":
        return ToolChoice("required")
    if choice.name is None:
        raise bad_request("Missing required parameter: 'tool_choice.name'.", param="tool_choice.name",
                          code="missing_required_parameter")  # fmt: skip
    return ToolChoice("required", (choice.name,), exactly_one=True)
