"""The request bodies of the generation endpoints: types and ranges of every served field.

Strict: "4" is not an integer, true is not a number; but 4.0 is one, as in JSON Schema. `null` means "default" and is
removed before validation. Limits that are settings of the server (n, stop strings, logprobs) are checked with it.
Names, defaults and ranges: OpenAI's document; the extra sampling fields are vLLM's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Protocol

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    StrictBool,
    StrictStr,
    ValidationError,
    WithJsonSchema,
)

from deployments.protocol.errors import ApiError, bad_request, unsupported
from deployments.protocol.fields import BY_NAME, Endpoint
from deployments.protocol.limits import Limits
from deployments.protocol.structured import ResponseFormat, StructuredOutputs, one_grammar
from deployments.protocol.tools import Choice, Tools
from deployments.protocol.validation import translate
from deployments.protocol.values import (
    BIAS_SCHEMA,
    CONTENT_SCHEMA,
    INT64,
    PROMPT_SCHEMA,
    STOP_SCHEMA,
    Effort,
    Float,
    Int,
    LastTokens,
    Nested,
    TokenId,
    as_bias,
    as_prompts,
    as_stops,
    one_of_them,
)
from model_core.grammar.spec import GrammarSpec


class StreamOptions(Nested):
    include_usage: StrictBool = False
    continuous_usage_stats: StrictBool = False  # vLLM's: usage in every chunk
    include_obfuscation: StrictBool = False  # accepted; padding against traffic analysis is not sent


class SamplingRequest(BaseModel):
    """What all generation endpoints share, whoever invented them."""

    model_config = ConfigDict(extra="ignore")

    model: StrictStr = ""
    temperature: Annotated[Float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[Float, Field(ge=0, le=1)] = 1.0
    stream: StrictBool = False
    seed: Annotated[Int, Field(ge=-INT64, le=INT64 - 1)] | None = None
    presence_penalty: Annotated[Float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[Float, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[dict[int, float], BeforeValidator(as_bias), WithJsonSchema(BIAS_SCHEMA)] = {}

    top_k: Annotated[Int, Field(ge=-1, le=INT64 - 1)] = 0
    min_p: Annotated[Float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[Float, Field(ge=0.01, le=10)] = 1.0
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] = []
    min_tokens: Annotated[Int, Field(ge=0)] = 0
    ignore_eos: StrictBool = False
    include_stop_str_in_output: StrictBool = False
    skip_special_tokens: StrictBool = True
    truncate_prompt_tokens: LastTokens | None = None
    priority: Annotated[Int, Field(ge=-1000, le=1000)] = 0
    cache_salt: Annotated[StrictStr, Field(max_length=128, pattern=r"^[^@/\\\x00]+$")] | None = None
    structured_outputs: StructuredOutputs | None = None


class GenerationRequest(SamplingRequest):
    """What OpenAI's chat and text completions share."""

    max_tokens: Annotated[Int, Field(ge=1)] | None = None
    n: Annotated[Int, Field(ge=1)] = 1
    stop: Annotated[list[str], BeforeValidator(as_stops), WithJsonSchema(STOP_SCHEMA)] = []
    stream_options: StreamOptions | None = None
    request_id: Annotated[StrictStr, Field(pattern=r"^[\x21-\x7e]{1,128}$")] | None = None
    return_token_ids: StrictBool = False
    prompt_logprobs: Annotated[Int, Field(ge=0)] | None = None
    timings: StrictBool = False
    response_format: ResponseFormat | None = None

    _grammar: GrammarSpec | None = PrivateAttr(None)

    @property
    def grammar(self) -> GrammarSpec | None:
        """What the answer must look like, whichever field says it."""
        return self._grammar

    def held_to(self, grammar: GrammarSpec | None) -> None:
        self._grammar = grammar

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats


class FunctionCall(Nested):
    name: StrictStr
    arguments: StrictStr = ""


class ToolCall(Nested):
    id: StrictStr
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Nested):
    """One message of a conversation; `content` becomes plain text in protocol/messages.py."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[Any, WithJsonSchema(CONTENT_SCHEMA)] = None
    name: StrictStr | None = None
    tool_call_id: StrictStr | None = None
    tool_calls: list[ToolCall] | None = None


class ChatRequest(GenerationRequest):
    model_config = ConfigDict(json_schema_extra=one_of_them("messages", "prompt"))

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    prompt: StrictStr | None = None  # the original specification's own example body: one user message
    max_completion_tokens: Annotated[Int, Field(ge=1)] | None = None
    logprobs: StrictBool = False
    top_logprobs: Annotated[Int, Field(ge=0)] | None = None
    tools: Tools = []
    tool_choice: Choice = None
    parallel_tool_calls: StrictBool = True
    reasoning_effort: Effort | None = None
    add_generation_prompt: StrictBool | None = None  # true unless the last message is continued
    continue_final_message: StrictBool = False
    chat_template_kwargs: dict[str, Any] = {}

    @property
    def generation_prompt(self) -> bool:
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def asked_logprobs(self) -> int | None:
        """As SamplingParams.logprobs: None for none, else how many alternatives."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def scored_logprobs(self) -> int | None:
        """The same of prompt tokens."""
        return self.prompt_logprobs


class CompletionRequest(GenerationRequest):
    prompt: Annotated[list[Any], BeforeValidator(as_prompts), Field(max_length=1024), WithJsonSchema(PROMPT_SCHEMA)]
    max_tokens: Annotated[Int, Field(ge=0)] = 16
    echo: StrictBool = False
    logprobs: Annotated[Int, Field(ge=0)] | None = None
    best_of: Int | None = None
    add_special_tokens: StrictBool = True

    @property
    def asked_tokens(self) -> int:
        return self.max_tokens

    @property
    def asked_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def scored_logprobs(self) -> int | None:
        echoed = self.logprobs if self.echo else None
        return max((one for one in (echoed, self.prompt_logprobs) if one is not None), default=None)


def parse_chat(body: dict[str, Any], limits: Limits) -> tuple[ChatRequest, list[str]]:
    """A validated chat request and the names of unknown fields. Raises ApiError 400."""
    request, unknown = parse_fields(ChatRequest, "chat", body)
    if request.messages is None and request.prompt is None:
        raise bad_request(
            "Missing required parameter: 'messages'.", param="messages", code="missing_required_parameter"
        )
    if request.messages is not None and request.prompt is not None:
        raise bad_request("Send either 'messages' or 'prompt', not both.", param="prompt")
    check_continued(request)
    if request.top_logprobs is not None and not request.logprobs:
        raise bad_request("'top_logprobs' is only allowed when 'logprobs' is true.", param="top_logprobs")
    _check_limits(request, limits, request.top_logprobs, "top_logprobs")
    _hold(request)
    return request, unknown


class Continued(Protocol):
    """The fields of a request whose last message may be continued."""

    messages: list[Message] | None
    add_generation_prompt: bool | None
    continue_final_message: bool


def check_continued(request: Continued) -> None:
    """Raises ApiError 400 for a last message that cannot be continued."""
    if not request.continue_final_message:
        return
    if request.add_generation_prompt:
        raise bad_request("'continue_final_message' and 'add_generation_prompt' cannot both be true.",
                          param="continue_final_message")  # fmt: skip
    if request.messages is None or request.messages[-1].role != "assistant":
        raise bad_request("'continue_final_message' needs a last message of role assistant.",
                          param="continue_final_message")  # fmt: skip


def parse_completion(body: dict[str, Any], limits: Limits) -> tuple[CompletionRequest, list[str]]:
    """A validated completion request and the names of unknown fields. Raises ApiError 400."""
    request, unknown = parse_fields(CompletionRequest, "completions", body)
    if request.best_of is not None and request.best_of != request.n:
        raise unsupported("best_of", "'best_of' is only supported equal to 'n'. Ask for n and choose in the client.")
    if request.max_tokens == 0 and not request.echo:
        raise bad_request(
            "Invalid 'max_tokens': integer below minimum value. Expected a value >= 1 (0 only with 'echo'), "
            "but got 0 instead.",
            param="max_tokens",
            code="integer_below_min_value",
        )
    _check_limits(request, limits, request.logprobs, "logprobs")
    _hold(request)
    return request, unknown


def _hold(request: GenerationRequest) -> None:
    request.held_to(one_grammar(response_format=request.response_format, structured_outputs=request.structured_outputs))


def parse_fields(model: Any, endpoint: Endpoint, body: dict[str, Any]) -> tuple[Any, list[str]]:
    """A `model` of the body and the names of unknown fields; refuses what the table says. Raises ApiError 400."""
    known = BY_NAME[endpoint]
    present = {name: value for name, value in body.items() if value is not None}
    unknown = [name for name in present if name not in known]
    for name in present:
        field = known.get(name)
        if field is not None and field.status == "refused" and present[name] not in field.harmless:
            raise unsupported(name, f"Unsupported parameter: '{name}' is not supported by this server. {field.note}")
    try:
        return model.model_validate(present), unknown
    except ValidationError as error:
        raise translate(error) from None


def _check_limits(request: GenerationRequest, limits: Limits, logprobs: int | None, logprobs_name: str) -> None:
    if request.n > limits.max_n:
        raise _above("n", limits.max_n, request.n)
    for name, value in ((logprobs_name, logprobs), ("prompt_logprobs", request.prompt_logprobs)):
        if value is not None and value > limits.max_logprobs:
            raise _above(name, limits.max_logprobs, value)
    check_stops(request.stop, limits)
    if request.stream_options is not None and not request.stream:
        raise bad_request("'stream_options' is only allowed when 'stream' is true.", param="stream_options")


def check_stops(stops: list[str], limits: Limits, name: str = "stop") -> None:
    """Raises ApiError 400."""
    if len(stops) > limits.max_stop_strings:
        raise bad_request(
            f"Invalid '{name}': array too long. Expected an array with maximum length {limits.max_stop_strings}, "
            f"but got an array with length {len(stops)} instead.",
            param=name,
            code="array_above_max_length",
        )


def _above(name: str, limit: int, got: int) -> ApiError:
    return bad_request(
        f"Invalid '{name}': integer above maximum value. Expected a value <= {limit}, but got {got} instead.",
        param=name,
        code="integer_above_max_value",
    )
