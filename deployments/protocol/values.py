"""Types of request fields, strict as JSON Schema is: "4" is not an integer, true is not a number; but 4.0 is an integer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from deployments.protocol.validation import expected
from model_core.engine.validate import MAX_LOGIT_BIAS

INT64 = 2**63


def _whole(value: Any) -> Any:
    if type(value) is not float or not value.is_integer():
        return value
    # the JSON reader makes floats of integers beyond 64 bits, and -2**63 of the first of them
    return int(value) if value != -INT64 else -INT64 - 1


def as_stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list):
        raise expected("one of a string or array of strings", value)
    for stop in stops:
        if not isinstance(stop, str):
            raise expected("one of a string or array of strings", stop)
        if not stop:
            raise PydanticCustomError("empty_string", "Expected non-empty strings, but got an empty string")
    return stops


def as_prompts(value: Any) -> Any:
    """A string, strings, token ids or lists of token ids → list of prompts, each a string or a list of ids."""
    words = "a string, array of strings, array of token ids, or array of token id arrays"
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise expected(words, value)
    if not value:
        raise PydanticCustomError("too_short", "", {"min_length": 1})
    if all(type(item) in (int, float) for item in value):  # not bool
        return [_as_ids(value, words)]
    for i, item in enumerate(value):
        if isinstance(item, list):
            if not item:
                raise PydanticCustomError("too_short", "", {"min_length": 1})
            value[i] = _as_ids(item, words)
        elif not isinstance(item, str):
            raise expected(words, item)
    if len({type(item) for item in value}) > 1:
        raise PydanticCustomError("mixed", "Expected an array of one kind, but got strings and token ids together")
    return value


def _as_ids(items: list[Any], words: str) -> list[int]:
    """Their range is checked when the vocabulary is known."""
    ids = items if all(type(item) is int for item in items) else [_whole(item) for item in items]
    for i in ids:
        if type(i) is not int:
            raise expected(words, i)
    return ids


def as_bias(value: Any) -> Any:
    if not isinstance(value, dict):
        raise expected("an object", value)
    bias: dict[int, float] = {}
    for key, weight in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise PydanticCustomError("bias_key", "Expected token ids as keys, but got '{key}'", {"key": key[:40]})
        if type(weight) not in (int, float):
            raise expected("a number", weight)
        if not -100 <= weight <= 100:
            words = "Expected values from -100 to 100, but got {got}"
            raise PydanticCustomError("bias_value", words, {"got": repr(weight)[:40]})
        bias[int(key)] = float(weight)
    return bias


def _not_zero(value: int) -> int:
    if value == 0:
        raise PydanticCustomError("zero", "Expected -1 or a value >= 1, but got 0")
    return value


class Nested(BaseModel):
    """An object inside a request: `null` means "default" in it, too."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


Int = Annotated[int, BeforeValidator(_whole), Field(strict=True)]
Float = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]  # of reasoning
TokenId = Annotated[Int, Field(ge=0)]
LastTokens = Annotated[
    Int, Field(ge=-1), AfterValidator(_not_zero), WithJsonSchema({"type": "integer", "minimum": -1, "not": {"const": 0}})
]

# what the validators above take, for the OpenAPI document
BIAS_SCHEMA = {"type": "object", "maxProperties": MAX_LOGIT_BIAS, "propertyNames": {"pattern": "^[0-9]{1,9}$"},
               "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}}  # fmt: skip
STOP_SCHEMA = {"anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "items": {"type": "string", "minLength": 1}}]}
_IDS_SCHEMA = {"type": "array", "minItems": 1, "items": {"type": "integer"}}
PROMPT_SCHEMA = {"anyOf": [{"type": "string"}, _IDS_SCHEMA] + [
    {"type": "array", "minItems": 1, "maxItems": 1024, "items": items} for items in ({"type": "string"}, _IDS_SCHEMA)
]}  # fmt: skip


def part_schema(*kinds: str) -> dict[str, Any]:
    """Text parts of these types, or what an assistant once refused."""
    forms = [({"enum": list(kinds)}, "text"), ({"const": "refusal"}, "refusal")]
    return {"anyOf": [{"type": "object", "required": ["type", name], "properties": {"type": kind, name: {"type": "string"}}}
                      for kind, name in forms]}  # fmt: skip


CONTENT_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": part_schema("text")}, {"type": "null"}]}


def one_of_them(*names: str) -> dict[str, Any]:
    """Of fields that may each be left out one is needed."""
    return {"anyOf": [{"required": [name]} for name in names]}
