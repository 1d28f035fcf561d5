"""JSON schemas as grammars: every keyword is known and enforced, or refused with its path.

What JSON Schema leaves open is closed, in the direction that keeps every answer valid: objects have the listed properties only,
in their order; a list of enum values keeps those of the type; a pattern holds for the whole string. Strings have no \\u escape,
those with a length or a pattern no escapes at all where they can do without; numbers have at most 15 digits, so that what is
read is what was checked. Between the parts of a document stand ", " and ": ".
"""

from __future__ import annotations

from typing import Any

from model_core.grammar.arrays import array
from model_core.grammar.bounds import BOUNDS, integer, number
from model_core.grammar.disjoint import disjoint
from model_core.grammar.ebnf import Rules, either
from model_core.grammar.number import NUMBER
from model_core.grammar.objects import Objects
from model_core.grammar.part import Part
from model_core.grammar.strings import STRING, string
from model_core.grammar.values import const, enum

MAX_NODES = 2000
MAX_DEPTH = 64

_NOTES = {"title", "description", "default", "examples", "$schema", "$comment", "deprecated", "readOnly", "writeOnly",
          "discriminator", "$defs", "definitions"}  # fmt: skip
_OF_TYPE = {
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": {*BOUNDS},
    "number": {*BOUNDS},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties"},
}
_TYPED = set().union(*_OF_TYPE.values())
_WHOLE = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")  # each of them says all that a schema says
_HARMLESS: dict[str, Any] = {"uniqueItems": False, "minContains": 0, "nullable": False}


def schema_grammar(schema: Any, param: str, rules: Rules) -> str:
    """The name of the rule for a value of this schema. Raises RequestError, with the path of what cannot be enforced.
    param: the request's field that it came from."""
    root = Part(schema, "#", param)
    return _Walk(root, rules).rule(root)


def keywords_grammar(schema: dict[str, Any], param: str, rules: Rules) -> str:
    """The same for the schema of an object, which is written as Python's arguments by name, a=1, b="x": its listed properties,
    whose names must be words. Values are written as in JSON."""
    root = Part(schema, "#", param)
    return rules.add(_Walk(root, rules).objects.arguments(root))


class _Walk:
    """From part to part of a schema, down to values."""

    def __init__(self, root: Part, rules: Rules) -> None:
        self._root, self._rules = root, rules
        self._known: dict[str, str] = {}  # rules by pointer, of what a $ref names
        self._open: list[str] = []  # pointers whose value has not begun yet: a $ref to one of them would never begin
        self._nodes = self._depth = 0
        self._any = ""
        self.objects = Objects(rules, self.inner)

    def rule(self, part: Part) -> str:
        """The name of a rule."""
        return self._rules.add(self.deeper(part))

    def inner(self, part: Part) -> str:
        """The same, behind a bracket or a key."""
        before, self._open = self._open, []
        name = self.rule(part)
        self._open = before
        return name

    def deeper(self, part: Part) -> str:
        """Every way down comes through here, also that by references."""
        self._nodes += 1
        self._depth += 1
        if self._nodes > MAX_NODES or self._depth > MAX_DEPTH:
            part.refuse(f"a schema of more than {MAX_NODES} parts, or {MAX_DEPTH} levels,")
        body = self._body(part)
        self._depth -= 1
        return body

    def _body(self, part: Part) -> str:
        node = part.node
        if node is True:
            return self._any_value()
        if not isinstance(node, dict):
            part.refuse("false, or what is no schema,")
        keys = {key for key in node if key not in _NOTES and not key.startswith("x-")}
        keys -= {"$id"} if part.path == "#" else set()
        keys -= {key for key, value in _HARMLESS.items() if key in keys and node[key] == value}
        whole = next((name for name in _WHOLE if name in keys), None)
        if whole is None:
            return self._typed(part, keys)
        others = keys - {whole} - ({"type"} if whole in ("const", "enum") else set())
        if others:
            part.refuse(f"{min(others)!r} beside {whole!r}", min(others))
        match whole:
            case "$ref":
                return self._ref(part)
            case "const":
                return const(part)
            case "enum":
                return enum(part)
            case "anyOf":
                return either(self._each(part, whole))
            case "oneOf":
                return self._one_of(part)
            case _:
                return self._all_of(part)

    def _any_value(self) -> str:
        """Any JSON value."""
        if not self._any:
            value, add = self._rules.name(), self._rules.add
            text = add(STRING)
            member = add(f'{text} ": " {value}')
            braced, row = f'"{{" ({member} (", " {member})*)? "}}"', f'"[" ({value} (", " {value})*)? "]"'
            self._rules.define(value, either([text, add(NUMBER), '"true"', '"false"', '"null"', braced, row]))
            self._any = value
        return self._any

    # ---- what says all ---------------------------------------------------------------------------------------------------

    def _ref(self, part: Part) -> str:
        target = part.node["$ref"]
        if not isinstance(target, str) or not (target == "#" or target.startswith("#/")):
            part.refuse(f"{target!r}, which is not in this document,", "$ref")
        if target in self._open:
            part.refuse("a reference to itself", "$ref")
        if target not in self._known:
            found = self._resolve(target)
            if found is None:
                part.refuse(f"{target!r}, which is no schema in this document,", "$ref")
            self._known[target] = name = self._rules.name()
            self._open.append(target)
            self._rules.define(name, self.deeper(Part(found, target, part.param)))
            self._open.remove(target)
        return self._known[target]

    def _resolve(self, target: str) -> Any:
        node = self._root.node
        for key in target.split("/")[1:]:
            key = key.replace("~1", "/").replace("~0", "~")
            if isinstance(node, list) and key.isdecimal() and int(key) < len(node):
                node = node[int(key)]
            else:
                node = node.get(key) if isinstance(node, dict) else None
        return node

    def _each(self, part: Part, key: str) -> list[str]:
        """Names of rules, of the schemas in a list."""
        nodes = part.node[key]
        if not isinstance(nodes, list) or not nodes:
            part.refuse("what is no list of schemas", key)
        return [self.rule(part.child(node, key, index)) for index, node in enumerate(nodes)]

    def _one_of(self, part: Part) -> str:
        found, nodes = self._each(part, "oneOf"), part.node["oneOf"]
        branches = [self._resolve(one["$ref"]) if isinstance(one, dict) and "$ref" in one else one for one in nodes]
        if len(branches) > 1 and not disjoint(branches):
            part.refuse("'oneOf' of schemas that differ neither in type nor in a required const (use 'anyOf')", "oneOf")
        return either(found)

    def _all_of(self, part: Part) -> str:
        found = self._each(part, "allOf")
        if len(found) > 1:
            part.refuse("'allOf' of several schemas", "allOf")
        return found[0]

    # ---- by type ---------------------------------------------------------------------------------------------------------

    def _typed(self, part: Part, keys: set[str]) -> str:
        for key in sorted(keys - _TYPED - {"type"}):
            part.refuse(f"the keyword {key!r}", key)
        if "type" in part.node:
            return either(self._of_type(kind, part) for kind in part.types())
        if not keys:
            return self._any_value()
        kinds = [kind for kind in ("string", "number", "array", "object") if keys <= _OF_TYPE[kind]]
        if not kinds:
            part.refuse("keywords of several types without a 'type'")
        return self._of_type(kinds[0], part)

    def _of_type(self, kind: str, part: Part) -> str:
        match kind:
            case "null":
                return '"null"'
            case "boolean":
                return '("true" | "false")'
            case "string":
                return string(part, self._rules)
            case "number":
                return number(part, self._rules)
            case "integer":
                return integer(part, self._rules)
            case "array":
                return array(part, self.inner)
            case _:
                return self.objects.braced(part)
