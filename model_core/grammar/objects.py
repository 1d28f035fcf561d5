"""Objects of a JSON document."""

from __future__ import annotations

import re
from collections.abc import Callable

from model_core.grammar.ebnf import NOTHING, Rules, literal
from model_core.grammar.part import Part
from model_core.grammar.series import MAX_ITEMS, items, members
from model_core.grammar.strings import STRING, matching
from model_core.grammar.values import written

_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Objects:
    """Two ways to write an object; both raise RequestError. inner: the name of the rule for a value in it."""

    def __init__(self, rules: Rules, inner: Callable[[Part], str]) -> None:
        self._rules, self._inner = rules, inner

    def braced(self, part: Part) -> str:
        """As JSON: its listed properties, in their order, or else properties of any names that it allows."""
        low, high = part.counts("minProperties", "maxProperties", MAX_ITEMS)
        inside = self._listed(part, low, high, _key)
        if inside is None:
            member = self._unlisted(part)
            if member is None:
                _refuse_any(part, low)
                return '"{}"'
            inside = items([], member, low, high)
        return f'"{{" {inside} "}}"'

    def arguments(self, part: Part) -> str:
        """As Python's arguments by name, a=1, b="x": its listed properties, whose names must be words."""
        low, high = part.counts("minProperties", "maxProperties", MAX_ITEMS)
        inside = self._listed(part, low, high, _argument)
        if inside is None:
            _refuse_any(part, low)
            return NOTHING
        return inside

    def _listed(self, part: Part, low: int, high: int | None, named: Callable[[str, Part], str]) -> str | None:
        """low to high of the properties that are listed or required; None if none are. named: what stands before a value."""
        node = part.node
        listed, required, extra = node.get("properties", {}), node.get("required", []), node.get("additionalProperties")
        if not isinstance(listed, dict):
            part.refuse("what is no object of schemas", "properties")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            part.refuse("what is no list of names", "required")
        missing = [name for name in required if name not in listed]
        if missing and extra is False:
            part.refuse(f"{missing[0]!r}, which is not among the properties,", "required")
        if not listed and not required:
            if low > 1:  # a name could come twice
                part.refuse("so many properties whose names are not listed", "minProperties")
            return None
        if isinstance(extra, dict) and extra:
            part.refuse("a schema of further properties beside listed ones", "additionalProperties")
        if "patternProperties" in node:
            part.refuse("'patternProperties' beside listed properties", "patternProperties")
        parts = [(f"{named(name, part)} {self._inner(part.child(one, 'properties', name))}", name in required)
                 for name, one in {**listed, **dict.fromkeys(missing, True)}.items()]  # fmt: skip
        inside = members(self._rules, parts, low, high)
        if inside is None:
            part.refuse("a number of properties that does not go with the listed and required ones",
                        "maxProperties" if high is not None else "minProperties")
        return inside

    def _unlisted(self, part: Part) -> str | None:
        """A property that is not listed; None if there can be none."""
        patterns, extra = part.node.get("patternProperties"), part.node.get("additionalProperties")
        if patterns is None:
            if extra is False or (extra is None and "properties" in part.node):  # of many tools: no arguments
                return None
            value = self._inner(part.child(True if extra is None else extra, "additionalProperties"))
            name = self._rules.add(STRING)
        else:
            if not isinstance(patterns, dict) or len(patterns) != 1 or extra:
                part.refuse("'patternProperties' beside others, or not exactly one of them,", "patternProperties")
            ((pattern, one),) = patterns.items()
            name = matching(pattern, part, self._rules, "patternProperties")
            value = self._inner(part.child(one, "patternProperties", pattern))
        return self._rules.add(f'{name} ": " {value}')


def _key(name: str, part: Part) -> str:
    return f'{written(name)} ": "'


def _argument(name: str, part: Part) -> str:
    if not _WORD.fullmatch(name):
        part.refuse("a name that cannot be written as Python's arguments are", "properties", name)
    return literal(name + "=")


def _refuse_any(part: Part, low: int) -> None:
    """No property can be there: none may be asked for."""
    if low:
        part.refuse("a property where none is allowed", "minProperties")
