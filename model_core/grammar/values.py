"""Values that a schema lists: const and enum."""

from __future__ import annotations

import json
from typing import Any

from model_core.grammar.ebnf import either, literal
from model_core.grammar.part import TYPES, Part


def const(part: Part) -> str:
    return enum(part.child({"type": part.node.get("type", TYPES), "enum": [part.node["const"]]}))


def enum(part: Part) -> str:
    """One of the values that have the type. Raises RequestError if none has."""
    values = part.node["enum"]
    if not isinstance(values, list):
        part.refuse("what is no list", "enum")
    types = part.types()
    kept = [value for value in values if _is_any(value, types)]
    if not kept:
        part.refuse("a list without a value of the type", "enum")
    return either(written(value) for value in kept)


def written(value: Any) -> str:
    """A value as JSON, with escapes only where it cannot be written without."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        return literal(text)
    except ValueError:
        return literal(json.dumps(value))


def _is_any(value: Any, types: tuple[str, ...]) -> bool:
    kinds = {str: ["string"], bool: ["boolean"], int: ["integer", "number"], list: ["array"], dict: ["object"],
             float: ["number", *(["integer"] if isinstance(value, float) and value.is_integer() else [])],
             type(None): ["null"]}[type(value)]  # fmt: skip
    return any(kind in types for kind in kinds)
