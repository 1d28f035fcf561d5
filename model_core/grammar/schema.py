"""JSON schemas as grammars: every keyword is known and enforced, or refused with its path.

What JSON Schema leaves open is closed, in the direction that keeps every answer valid: objects have the listed properties only,
in their order; a list of enum values keeps those of the type; a pattern holds for the whole string. Strings have no \\u escape,
those with a length or a pattern no escapes at all where they can do without; numbers have at most 15 digits, so that what is
read is what was checked. Between the parts of a document stand ", " and ": ".
"""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal
from typing import Any, NoReturn

from model_core.errors import RequestError
from model_core.grammar.disjoint import disjoint
from model_core.grammar.ebnf import MAX_REPEAT, NOTHING, Rules, either, literal, one_of, repeated
from model_core.grammar.formats import FORMATS
from model_core.grammar.number import DIGITS, INTEGER, NUMBER, Bound, integers, numbers
from model_core.grammar.pattern import ESCAPED_IN_JSON, PLAIN_IN_JSON, pattern_grammar
from model_core.grammar.series import items, members

MAX_NODES = 2000
MAX_DEPTH = 64
MAX_LENGTH = MAX_REPEAT  # of a string with a bound on its length
MAX_ITEMS = 1000
INVALID = "invalid_json_schema"

TYPES = ("string", "integer", "number", "boolean", "null", "array", "object")
_NOTES = {"title", "description", "default", "examples", "$schema", "$comment", "deprecated", "readOnly", "writeOnly",
          "discriminator", "$defs", "definitions"}  # fmt: skip
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_OF_TYPE = {
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": {*_BOUNDS},
    "number": {*_BOUNDS},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties"},
}
_TYPED = set().union(*_OF_TYPE.values())
_WHOLE = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")  # each of them says all that a schema says
_HARMLESS: dict[str, Any] = {"uniqueItems": False, "minContains": 0, "nullable": False}
_FURTHEST = Decimal(10**DIGITS - 1)
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLAIN = one_of(PLAIN_IN_JSON)
_STRING = f'"\\"" ({_PLAIN} | {ESCAPED_IN_JSON})* "\\""'


def schema_grammar(schema: Any, param: str, rules: Rules) -> str:
    """The name of the rule for a value of this schema. Raises RequestError, with the path of what cannot be enforced.
    param: the request's field that it came from."""
    return _Walk(schema, param, rules).rule(schema, "#")


def keywords_grammar(schema: dict[str, Any], param: str, rules: Rules) -> str:
    """The same for the schema of an object, which is written as Python's arguments by name, a=1, b="x": its listed properties,
    whose names must be words. Values are written as in JSON."""
    return rules.add(_Walk(schema, param, rules)._object(schema, "#", keywords=True))


class _Walk:
    def __init__(self, root: Any, param: str, rules: Rules) -> None:
        self._root, self._param, self._rules = root, param, rules
        self._known: dict[str, str] = {}  # rules by pointer, of what a $ref names
        self._open: list[str] = []  # pointers whose value has not begun yet: a $ref to one of them would never begin
        self._nodes = self._depth = 0
        self._any = ""

    def refuse(self, path: str, what: str, why: str = "cannot be enforced") -> NoReturn:
        raise RequestError(f"Invalid schema for '{self._param}': at '{path}': {what} {why}", param=self._param, code=INVALID)

    def rule(self, node: Any, path: str) -> str:
        """The name of a rule."""
        return self._rules.add(self.deeper(node, path))

    def inner(self, node: Any, path: str) -> str:
        """The same, behind a bracket or a key."""
        before, self._open = self._open, []
        name = self.rule(node, path)
        self._open = before
        return name

    def deeper(self, node: Any, path: str) -> str:
        """The body of a rule. Every way down comes through here, also that by references."""
        self._nodes += 1
        self._depth += 1
        if self._nodes > MAX_NODES or self._depth > MAX_DEPTH:
            self.refuse(path, f"a schema of more than {MAX_NODES} parts, or {MAX_DEPTH} levels,")
        body = self.body(node, path)
        self._depth -= 1
        return body

    def body(self, node: Any, path: str) -> str:
        if node is True:
            return self.any_value()
        if not isinstance(node, dict):
            self.refuse(path, "false, or what is no schema,")
        keys = {key for key in node if key not in _NOTES and not key.startswith("x-")} - ({"$id"} if path == "#" else set())
        keys -= {key for key, value in _HARMLESS.items() if key in keys and node[key] == value}
        whole = next((name for name in _WHOLE if name in keys), None)
        if whole is None:
            return self._typed(node, keys, path)
        others = keys - {whole} - ({"type"} if whole in ("const", "enum") else set())
        if others:
            self.refuse(f"{path}/{_escaped(min(others))}", f"{min(others)!r} beside {whole!r}")
        found: str = getattr(self, "_" + whole.removeprefix("$"))(node, path)
        return found

    def any_value(self) -> str:
        """Any JSON value."""
        if not self._any:
            value, add = self._rules.name(), self._rules.add
            string = add(_STRING)
            member = add(f'{string} ": " {value}')
            object_, array = f'"{{" ({member} (", " {member})*)? "}}"', f'"[" ({value} (", " {value})*)? "]"'
            self._rules.define(value, either([string, add(NUMBER), '"true"', '"false"', '"null"', object_, array]))
            self._any = value
        return self._any

    # ---- what says all ---------------------------------------------------------------------------------------------------

    def _ref(self, node: dict[str, Any], path: str) -> str:
        target = node["$ref"]
        if not isinstance(target, str) or not (target == "#" or target.startswith("#/")):
            self.refuse(f"{path}/$ref", f"{target!r}, which is not in this document,")
        if target in self._open:
            self.refuse(f"{path}/$ref", "a reference to itself")
        if target not in self._known:
            found = self._resolve(target)
            if found is None:
                self.refuse(f"{path}/$ref", f"{target!r}, which is no schema in this document,")
            self._known[target] = name = self._rules.name()
            self._open.append(target)
            self._rules.define(name, self.deeper(found, target))
            self._open.remove(target)
        return self._known[target]

    def _resolve(self, target: str) -> Any:
        node = self._root
        for part in target.split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
                node = node[int(part)]
            else:
                node = node.get(part) if isinstance(node, dict) else None
        return node

    def _const(self, node: dict[str, Any], path: str) -> str:
        return self._enum({"type": node.get("type", TYPES), "enum": [node["const"]]}, path)

    def _enum(self, node: dict[str, Any], path: str) -> str:
        values = node["enum"]
        if not isinstance(values, list):
            self.refuse(f"{path}/enum", "what is no list")
        types = self._types(node.get("type", TYPES), path)
        kept = [value for value in values if _is_any(value, types)]
        if not kept:
            self.refuse(f"{path}/enum", "a list without a value of the type")
        return either(literal(_json(value)) for value in kept)

    def _list(self, nodes: Any, path: str) -> list[str]:
        if not isinstance(nodes, list) or not nodes:
            self.refuse(path, "what is no list of schemas")
        return [self.rule(node, f"{path}/{index}") for index, node in enumerate(nodes)]

    def _anyOf(self, node: dict[str, Any], path: str) -> str:
        return either(self._list(node["anyOf"], f"{path}/anyOf"))

    def _oneOf(self, node: dict[str, Any], path: str) -> str:
        found = self._list(node["oneOf"], f"{path}/oneOf")
        branches = [self._resolve(one["$ref"]) if isinstance(one, dict) and "$ref" in one else one for one in node["oneOf"]]
        if len(branches) > 1 and not disjoint(branches):
            self.refuse(f"{path}/oneOf", "'oneOf' of schemas that differ neither in type nor in a required const (use 'anyOf')")
        return either(found)

    def _allOf(self, node: dict[str, Any], path: str) -> str:
        found = self._list(node["allOf"], f"{path}/allOf")
        if len(found) > 1:
            self.refuse(f"{path}/allOf", "'allOf' of several schemas")
        return found[0]

    # ---- by type ---------------------------------------------------------------------------------------------------------

    def _types(self, given: Any, path: str) -> tuple[str, ...]:
        types = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, (list, tuple)) else ()
        if not types or not all(one in TYPES for one in types):
            self.refuse(f"{path}/type", f"{given!r}, not one of {', '.join(TYPES)},")
        return types

    def _typed(self, node: dict[str, Any], keys: set[str], path: str) -> str:
        for key in sorted(keys - _TYPED - {"type"}):
            self.refuse(f"{path}/{_escaped(key)}", f"the keyword {key!r}")
        rest = keys - {"type"}
        if "type" in node:
            types = self._types(node["type"], path)
        else:
            if not rest:
                return self.any_value()
            types = tuple(kind for kind in ("string", "number", "array", "object") if rest <= _OF_TYPE[kind])[:1]
            if not types:
                self.refuse(path, "keywords of several types without a 'type'")
        return either(getattr(self, "_" + kind)(node, path) for kind in types)

    def _null(self, node: dict[str, Any], path: str) -> str:
        return '"null"'

    def _boolean(self, node: dict[str, Any], path: str) -> str:
        return '("true" | "false")'

    def _string(self, node: dict[str, Any], path: str) -> str:
        low, high = self._counts(node, "minLength", "maxLength", path, MAX_LENGTH)
        bounded = low > 0 or high is not None
        at = f"Invalid schema for '{self._param}': at '{path}/pattern'"
        if "pattern" in node:
            if bounded or "format" in node:
                self.refuse(f"{path}/pattern", "'pattern' together with a length or a format")
            if not isinstance(node["pattern"], str):
                self.refuse(f"{path}/pattern", "what is no string")
            return f'"\\"" {pattern_grammar(node["pattern"], at, self._param, json=True)} "\\""'
        if "format" in node:
            kind = node["format"]
            if bounded:
                self.refuse(f"{path}/format", "'format' together with a length")
            if kind not in FORMATS:
                self.refuse(f"{path}/format", f"format {kind!r}, not one of {', '.join(sorted(FORMATS))},")
            return f'"\\"" {pattern_grammar(FORMATS[kind], at, self._param, json=True)} "\\""'
        return self._rules.add(f'"\\"" {repeated(_PLAIN, low, high)} "\\""' if bounded else _STRING)

    def _bounds(self, node: dict[str, Any], path: str) -> tuple[Bound | None, Bound | None]:
        found: dict[str, Decimal] = {}
        for key in _BOUNDS:
            if key in node:
                value = node[key]
                if type(value) not in (int, float) or not math.isfinite(value):
                    self.refuse(f"{path}/{key}", "a bound that is no number")
                found[key] = max(-_FURTHEST, min(_FURTHEST, Decimal(repr(value))))  # no number is written beyond that
        lows = [(found[key], key != "minimum") for key in ("minimum", "exclusiveMinimum") if key in found]
        highs = [(found[key], key != "maximum") for key in ("maximum", "exclusiveMaximum") if key in found]
        return max(lows, default=None), min(highs, key=lambda bound: (bound[0], not bound[1]), default=None)

    def _number(self, node: dict[str, Any], path: str) -> str:
        low, high = self._bounds(node, path)
        if low is None and high is None:
            return self._rules.add(NUMBER)
        return numbers(low, high) or self.refuse(path, "bounds without a number between them")

    def _integer(self, node: dict[str, Any], path: str) -> str:
        low, high = self._bounds(node, path)
        if low is None and high is None:
            return self._rules.add(INTEGER)
        least = None if low is None else math.floor(low[0]) + 1 if low[1] else math.ceil(low[0])
        most = None if high is None else math.ceil(high[0]) - 1 if high[1] else math.floor(high[0])
        return integers(least, most) or self.refuse(path, "bounds without an integer between them")

    def _array(self, node: dict[str, Any], path: str) -> str:
        low, high = self._counts(node, "minItems", "maxItems", path, MAX_ITEMS)
        prefix = node.get("prefixItems", [])
        first = [self.inner(one, f"{path}/prefixItems/{i}") for i, one in enumerate(prefix)] if isinstance(prefix, list) else []
        if "prefixItems" in node and not first:
            self.refuse(f"{path}/prefixItems", "what is no list of schemas")
        if high is not None and high < len(first):
            self.refuse(f"{path}/maxItems", "fewer items than 'prefixItems'")
        rest = node.get("items", not first)
        if rest is False and low > len(first):
            self.refuse(f"{path}/minItems", "more items than 'prefixItems' without 'items'")
        item = NOTHING if rest is False or high == len(first) else self.inner(rest, f"{path}/items")
        return f'"[" {items(first, item, max(0, low - len(first)), None if high is None else high - len(first))} "]"'

    def _named(self, name: str, path: str, keywords: bool) -> str:
        """What stands before the value of a property."""
        if not keywords:
            return f'{literal(_json(name))} ": "'
        if not _WORD.fullmatch(name):
            self.refuse(f"{path}/properties/{_escaped(name)}", "a name that cannot be written as Python's arguments are")
        return literal(name + "=")

    def _object(self, node: dict[str, Any], path: str, keywords: bool = False) -> str:
        low, high = self._counts(node, "minProperties", "maxProperties", path, MAX_ITEMS)
        listed, required, extra = node.get("properties", {}), node.get("required", []), node.get("additionalProperties")
        if not isinstance(listed, dict):
            self.refuse(f"{path}/properties", "what is no object of schemas")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            self.refuse(f"{path}/required", "what is no list of names")
        missing = [name for name in required if name not in listed]
        if missing and extra is False:
            self.refuse(f"{path}/required", f"{missing[0]!r}, which is not among the properties,")
        if listed or required:
            if isinstance(extra, dict) and extra:
                self.refuse(f"{path}/additionalProperties", "a schema of further properties beside listed ones")
            if "patternProperties" in node:
                self.refuse(f"{path}/patternProperties", "'patternProperties' beside listed properties")
            parts = [(f"{self._named(name, path, keywords)} {self.inner(one, f'{path}/properties/{_escaped(name)}')}",
                      name in required) for name, one in {**listed, **dict.fromkeys(missing, True)}.items()]  # fmt: skip
            inside = members(self._rules, parts, low, high)
            if inside is None:
                self.refuse(f"{path}/{'maxProperties' if high is not None else 'minProperties'}",
                            "a number of properties that does not go with the listed and required ones")
            return inside if keywords else f'"{{" {inside} "}}"'
        if low > 1:  # a name could come twice
            self.refuse(f"{path}/minProperties", "so many properties whose names are not listed")
        name, value = ("", "") if keywords else self._unlisted(node, extra, path)
        if not name:
            if low:
                self.refuse(f"{path}/minProperties", "a property where none is allowed")
            return NOTHING if keywords else '"{}"'
        member = self._rules.add(f'{name} ": " {value}')
        return f'"{{" {items([], member, low, high)} "}}"'

    def _unlisted(self, node: dict[str, Any], extra: Any, path: str) -> tuple[str, str]:
        """Name and value of properties that are not listed; "" if there can be none."""
        patterns = node.get("patternProperties")
        if patterns is None:
            if extra is False:
                return "", ""
            value = self.inner(True if extra is None else extra, f"{path}/additionalProperties")
            return self._rules.add(_STRING), value
        if not isinstance(patterns, dict) or len(patterns) != 1 or extra:
            self.refuse(f"{path}/patternProperties", "'patternProperties' beside others, or not exactly one of them,")
        ((pattern, one),) = patterns.items()
        at = f"Invalid schema for '{self._param}': at '{path}/patternProperties'"
        name = f'"\\"" {pattern_grammar(pattern, at, self._param, json=True)} "\\""'
        return name, self.inner(one, f"{path}/patternProperties/{_escaped(pattern)}")

    def _counts(self, node: dict[str, Any], least: str, most: str, path: str, limit: int) -> tuple[int, int | None]:
        found: list[int | None] = []
        for key in (least, most):
            value = node.get(key)
            if type(value) is float and value.is_integer():
                value = int(value)
            if value is not None and (type(value) is not int or not 0 <= value <= limit):
                self.refuse(f"{path}/{key}", f"{key!r} that is no integer from 0 to {limit}")
            found.append(value)
        low, high = found
        if high is not None and high < (low or 0):
            self.refuse(f"{path}/{most}", "a maximum below the minimum")
        return low or 0, high


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    try:
        literal(text)
    except ValueError:
        return json.dumps(value)
    return text


def _escaped(key: str) -> str:
    """A key as a part of a JSON pointer."""
    return key.replace("~", "~0").replace("/", "~1")


def _is_any(value: Any, types: tuple[str, ...]) -> bool:
    kinds = {str: ["string"], bool: ["boolean"], int: ["integer", "number"], list: ["array"], dict: ["object"],
             float: ["number", *(["integer"] if isinstance(value, float) and value.is_integer() else [])],
             type(None): ["null"]}[type(value)]  # fmt: skip
    return any(kind in types for kind in kinds)
