"""pydantic's first error → one ApiError in OpenAI's words, with the path of the field and a stable code."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from deployments.protocol.errors import ApiError, bad_request

_EXPECTED = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing_size": "a 64-bit integer",
    "float_type": "a decimal",
    "bool_type": "a boolean",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
_BOUNDS = {
    "greater_than_equal": ("below minimum value", ">=", "ge", "below_min_value"),
    "greater_than": ("below minimum value", ">", "gt", "below_min_value"),
    "less_than_equal": ("above maximum value", "<=", "le", "above_max_value"),
    "less_than": ("above maximum value", "<", "lt", "above_max_value"),
}


def expected(words: str, got: Any) -> PydanticCustomError:
    """The error of an own validator whose value has the wrong type."""
    return PydanticCustomError("wrong_type", "{words}", {"words": words, "got": json_type(got)})


def json_type(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int):
        return "an integer"
    if isinstance(value, float):
        return "a decimal number"
    if isinstance(value, str):
        return "a string"
    return "an array" if isinstance(value, list) else "an object"


def translate(error: ValidationError) -> ApiError:
    """The first of pydantic's errors as a 400: one clear sentence helps more than a list."""
    first = error.errors(include_url=False)[0]
    kind, value = first["type"], first.get("input")
    context: dict[str, Any] = first.get("ctx", {})
    name = field_path(first["loc"])
    if kind == "missing":
        return bad_request(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")
    if kind == "wrong_type":
        return _wrong_type(name, context["words"], context["got"])
    if kind in _EXPECTED:
        return _wrong_type(name, _EXPECTED[kind], json_type(value))
    if kind in _BOUNDS:
        words, sign, key, code = _BOUNDS[kind]
        bound = context[key]
        noun, limit = ("integer", str(bound)) if isinstance(bound, int) else ("decimal", f"{bound:g}")
        return bad_request(
            f"Invalid '{name}': {noun} {words}. Expected a value {sign} {limit}, but got {_brief(value)} instead.",
            param=name,
            code=f"{noun}_{code}",
        )
    if kind == "too_short":
        return bad_request(
            f"Invalid '{name}': empty array. Expected an array with minimum length {context['min_length']}, "
            "but got an empty array instead.",
            param=name,
            code="empty_array",
        )
    if kind == "too_long" and isinstance(value, dict):
        return bad_request(
            f"Invalid '{name}': too many properties. Expected an object with at most {context['max_length']} properties, "
            f"but got an object with {len(value)} properties instead.",
            param=name,
            code="object_above_max_properties",
        )
    if kind == "too_long":
        return bad_request(
            f"Invalid '{name}': array too long. Expected an array with maximum length {context['max_length']}, "
            f"but got an array with length {context['actual_length']} instead.",
            param=name,
            code="array_above_max_length",
        )
    if kind == "literal_error":
        return bad_request(
            f"Invalid value: {_brief(value)}. Supported values are: {context['expected']}.", param=name
        )
    code = "unsupported_parameter" if kind == "unsupported" else "invalid_value"
    return bad_request(f"Invalid '{name}': {first['msg']}.", param=name, code=code)


def field_path(loc: tuple[int | str, ...]) -> str:
    """("messages", 0, "content") → "messages[0].content"."""
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _wrong_type(name: str, words: str, got: str) -> ApiError:
    return bad_request(
        f"Invalid type for '{name}': expected {words}, but got {got} instead.", param=name, code="invalid_type"
    )


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
