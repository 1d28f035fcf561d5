"""The fields `tools`, `tool_choice` and `parallel_tool_calls` of a request, and what they come to for its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, StrictBool, StrictStr, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from deployments.protocol.errors import bad_request
from deployments.protocol.validation import expected
from deployments.protocol.values import Nested

MAX_TOOLS = 128
FunctionName = Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
Mode = Literal["none", "auto", "required"]


class Function(Nested):
    """A function that the model may ask the client to call; parameters: a JSON schema of the arguments."""

    model_config = ConfigDict(extra="ignore")

    name: FunctionName
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates know it: a tool of the chat API."""
        said = {"name": self.name, "description": self.description or ""}
        return {"type": "function", "function": {**said, "parameters": self.parameters or {"type": "object", "properties": {}}}}


class FlatTool(Function):
    """A tool of /v1/responses."""

    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _is_function(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind != "function":
            words = "Expected a tool of type 'function', but got '{kind}': others are not known here, and hosted ones not run"
            raise PydanticCustomError("unsupported", words, {"kind": kind[:40]})
        return value

    def nested(self) -> Tool:
        return Tool(type="function", function=self)


class Tool(Nested):
    model_config = ConfigDict(extra="ignore")

    type: Literal["function"]
    function: Function


@dataclass(frozen=True)
class ToolChoice:
    """names: the functions among which it chooses, None for all; exactly_one: a call of the only one of them."""

    mode: Mode
    names: tuple[str, ...] | None = None
    exactly_one: bool = False

    def flat(self) -> Any:
        """As /v1/responses writes it."""
        tools = [{"type": "function", "name": name} for name in self.names or ()]
        if self.exactly_one:
            return tools[0]
        return {"type": "allowed_tools", "mode": self.mode, "tools": tools} if tools else self.mode


def _as_choice(value: Any) -> Any:
    """Chat's form, and that of /v1/responses, which has the same members one level higher."""
    if isinstance(value, str):
        if value not in ("none", "auto", "required"):
            raise _wrong("'none', 'auto', 'required' or an object, but got '{got}'", value)
        return ToolChoice(value)  # type: ignore[arg-type]
    if not isinstance(value, dict):
        raise expected("one of a string or an object", value)
    if value.get("type") == "function":
        return ToolChoice("required", (_function_name(value),), exactly_one=True)
    if value.get("type") == "allowed_tools":
        return _allowed(value.get("allowed_tools", value))
    raise _wrong("a type of 'function' or 'allowed_tools', but got '{got}'", value.get("type"))


def _allowed(value: Any) -> ToolChoice:
    value = value if isinstance(value, dict) else {}
    mode, tools = value.get("mode"), value.get("tools")
    if mode not in ("auto", "required"):
        raise _wrong("a mode of 'auto' or 'required' of allowed_tools, but got '{got}'", mode)
    if not isinstance(tools, list) or not tools:
        raise _wrong("an array of tools in allowed_tools, but got '{got}'", tools)
    return ToolChoice(mode, tuple(map(_function_name, tools)))


def _function_name(value: Any) -> str:
    function = value.get("function", value) if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise _wrong("the name of a function, but got '{got}'", name)
    return name


def _wrong(words: str, got: Any) -> PydanticCustomError:
    return PydanticCustomError("tool_choice", "Expected " + words, {"got": str(got)[:40]})  # type: ignore[arg-type]


_TYPE = {"type": {"const": "function"}}
_NAMED = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
_FLAT = {"type": "object", "required": ["type", "name"], "properties": {**_TYPE, "name": {"type": "string"}}}
_NESTED = {"type": "object", "required": ["type", "function"], "properties": {**_TYPE, "function": _NAMED}}


def choice_schema(*, nested: bool) -> dict[str, Any]:
    """What _as_choice takes, in one of its forms."""
    function = _NESTED if nested else _FLAT
    allowed: dict[str, Any] = {
        "type": "object", "required": ["mode", "tools"],
        "properties": {"mode": {"enum": ["auto", "required"]}, "tools": {"type": "array", "minItems": 1, "items": function}},
    }  # fmt: skip
    members = {"allowed_tools": allowed} if nested else allowed["properties"]
    choice = {"type": "object", "required": ["type", *members], "properties": {"type": {"const": "allowed_tools"}, **members}}
    return {"anyOf": [{"enum": ["none", "auto", "required"]}, function, choice]}


Choice = Annotated[Any, BeforeValidator(_as_choice), WithJsonSchema(choice_schema(nested=True))]
FlatChoice = Annotated[Any, BeforeValidator(_as_choice), WithJsonSchema(choice_schema(nested=False))]
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]


@dataclass(frozen=True)
class Toolbox:
    """What one answer may call: at least one function. Only these are shown to the model, too."""

    functions: tuple[Function, ...]
    must_call: bool
    parallel: bool  # several calls, or at most one

    @property
    def names(self) -> frozenset[str]:
        return frozenset(function.name for function in self.functions)


def toolbox(tools: list[Tool], choice: ToolChoice | None, parallel: bool) -> Toolbox | None:
    """None if nothing may be called: no tools, or the choice is `none`. Raises ApiError 400."""
    choice = choice or ToolChoice("auto")
    functions = {tool.function.name: tool.function for tool in tools}
    if len(functions) < len(tools):
        raise bad_request("Invalid 'tools': two functions have the same name.", param="tools")
    if not tools:
        if choice.mode == "required" or choice.names:
            raise bad_request("'tool_choice' is only allowed when 'tools' are specified.", param="tool_choice")
        return None
    for name in choice.names or ():
        if name not in functions:
            known = ", ".join(f"'{known}'" for known in list(functions)[:20])
            raise bad_request(f"Invalid 'tool_choice': no function '{name[:128]}' in 'tools', which has {known}.",
                              param="tool_choice")  # fmt: skip
    if choice.mode == "none":
        return None
    chosen = tuple(function for name, function in functions.items() if choice.names is None or name in choice.names)
    return Toolbox(chosen, choice.mode == "required", parallel and not choice.exactly_one)
