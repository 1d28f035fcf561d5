"""Whether the branches of a oneOf exclude each other, so that a grammar may treat it as an anyOf."""

from __future__ import annotations

from typing import Any


def disjoint(branches: list[Any]) -> bool:
    """Whether no value can be valid for two of these schemas, as far as their types and required constants tell."""
    return all(_apart(one, other) for at, one in enumerate(branches) for other in branches[at + 1 :])


def _apart(one: Any, other: Any) -> bool:
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return False
    kinds = [{"number" if kind == "integer" else kind for kind in _kinds(node)} for node in (one, other)]
    if kinds[0] and kinds[1] and not kinds[0] & kinds[1]:
        return True
    values = [_values(node) for node in (one, other)]
    if values[0] and values[1] and not values[0] & values[1]:
        return True
    if kinds != [{"object"}, {"object"}]:
        return False
    inner = [node.get("properties", {}) for node in (one, other)]
    shared = [name for name in one.get("required", []) if name in other.get("required", []) and all(name in p for p in inner)]
    return any(_apart(inner[0][name], inner[1][name]) for name in shared if _values(inner[0][name]) and _values(inner[1][name]))


def _kinds(node: dict[str, Any]) -> list[str]:
    given = node.get("type", [])
    return [given] if isinstance(given, str) else list(given)


def _values(node: Any) -> set[str]:
    """The values that a const or an enum allows, if they are strings."""
    if not isinstance(node, dict):
        return set()
    found = [node["const"]] if "const" in node else node.get("enum", [])
    return set(found) if isinstance(found, list) and all(isinstance(value, str) for value in found) else set()
