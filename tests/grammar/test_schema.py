"""JSON schemas: whatever is written under their grammars is valid for them, and what could not be held is refused."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model_core.errors import RequestError
from model_core.grammar.spec import of_json_object, of_schema
from tests.grammar.walks import accepts, compiled, write

NAMES = st.sampled_from(["a", "b", "name", "é\"\\", "a b", "", "items"])
NUMBERS = st.one_of(st.integers(-1200, 1200), st.floats(-500, 500).map(lambda x: round(x, 3)))
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.text(max_size=4), st.sampled_from([0.5, -2.0, 1e22]))
PATTERNS = ["^a+$", "[a-c]{2,4}", r"^\d{3}-\d{4}$", r"^(x|yy)?z*$", r"^[^\s\"]{1,6}$", r"^.{2,5}$", r"\W\D\S", "(a(b{1,2})?c)+"]


def _both(low: st.SearchStrategy[Any], names: tuple[str, str]) -> st.SearchStrategy[dict[str, Any]]:
    """One bound, both in order, or none."""
    pairs = st.tuples(low, low).map(lambda pair: dict(zip(names, sorted(pair), strict=True)))
    return st.one_of(st.just({}), pairs, pairs.map(lambda pair: dict([next(iter(pair.items()))])))


STRINGS = st.one_of(
    _both(st.integers(0, 12), ("minLength", "maxLength")),
    st.sampled_from(PATTERNS).map(lambda pattern: {"pattern": pattern}),
    st.sampled_from(["date", "date-time", "ipv4", "ipv6", "uuid", "email", "hostname", "uri", "duration"]).map(
        lambda name: {"format": name}
    ),
).map(lambda rest: {"type": "string", **rest})
LEAVES = st.one_of(
    STRINGS,
    _both(NUMBERS, ("minimum", "maximum")).map(lambda rest: {"type": "number", **rest}),
    _both(NUMBERS, ("exclusiveMinimum", "exclusiveMaximum")).map(lambda rest: {"type": "number", **rest}),
    _both(NUMBERS, ("minimum", "maximum")).map(lambda rest: {"type": "integer", **rest}),
    st.lists(SCALARS, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    SCALARS.map(lambda value: {"const": value}),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["integer", "null"]}, {}, True, {"$ref": "#/$defs/tree"}]),
)


@st.composite
def objects(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> dict[str, Any]:
    properties = draw(st.dictionaries(NAMES, inner, max_size=4))
    node: dict[str, Any] = {"type": "object", "properties": properties}
    node["required"] = draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []
    if draw(st.booleans()):
        node["additionalProperties"] = draw(st.booleans()) if properties else draw(st.one_of(st.booleans(), inner))
    if draw(st.booleans()):
        node["maxProperties"] = draw(st.integers(len(node["required"]), 5))
    if properties and draw(st.booleans()):
        node["minProperties"] = draw(st.integers(0, min(len(properties), node.get("maxProperties", 9))))
    return node


def _nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    arrays = st.tuples(inner, _both(st.integers(0, 4), ("minItems", "maxItems"))).map(
        lambda pair: {"type": "array", "items": pair[0], **pair[1]}
    )
    tuples = st.lists(inner, min_size=1, max_size=3).map(lambda items: {"type": "array", "prefixItems": items, "items": False})
    return st.one_of(objects(inner), arrays, tuples, st.lists(inner, min_size=1, max_size=3).map(lambda any_: {"anyOf": any_}))


TREE = {"type": "object",
        "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]}},
        "required": ["v", "next"]}  # fmt: skip
SCHEMAS = st.recursive(LEAVES, _nested, max_leaves=8)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_what_is_written_is_valid(schema: Any, seed: int) -> None:
    whole = {"$defs": {"tree": TREE}, "allOf": [schema]}
    try:
        spec = of_schema(whole, "response_format")
    except RequestError as error:  # generated bounds may leave nothing between them
        assert "bounds without" in str(error) or "number of properties" in str(error)
        return
    grammar = compiled(spec)
    for attempt in range(4):
        answer, ended = write(grammar, seed + attempt)
        if ended:
            value = json.loads(answer.decode())  # strict UTF-8
            jsonschema.validate(value, whole, cls=jsonschema.Draft202012Validator,
                                format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)  # fmt: skip


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "string", "maxLength": 3}, "é€😀"),
        ({"type": "string"}, 'say "x"\n\\'),
        ({"type": "number"}, -12.5e3),
        ({"type": "array", "items": {"type": "integer"}, "minItems": 2}, [1, 2, 3]),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, {"x": 1, "y": 2}),
        ({"type": "object", "properties": {"a": {"type": "null"}, "b": {"enum": ["x"]}}}, {"b": "x"}),
        ({"enum": [{"deep": [1, None, "ü"]}]}, {"deep": [1, None, "ü"]}),
        ({"oneOf": [{"type": "string"}, {"type": "integer"}]}, 7),
        ({"type": "string", "format": "date-time"}, "2026-11-25T10:00:00Z"),
        ({"type": "integer", "maximum": 1e30}, -999999999999999),
    ],
)
def test_sensible_values_can_be_written(schema: Any, value: Any) -> None:
    written = "-12.5e3" if value == -12.5e3 else json.dumps(value, ensure_ascii=False)
    assert accepts(compiled(of_schema(schema, "response_format")), written)


def test_any_object() -> None:
    grammar = compiled(of_json_object("response_format"))
    assert accepts(grammar, '{"a": [1, {"b": null}], "c": "\\n"}')
    assert not accepts(grammar, "[1]") and not accepts(grammar, '{"a": 1')


def test_an_empty_list_of_properties_lists_all_of_them() -> None:
    empty: dict[str, Any] = {"type": "object", "properties": {}}
    for schema, takes_more in ((empty, False), ({**empty, "additionalProperties": True}, True), ({"type": "object"}, True)):
        grammar = compiled(of_schema(schema, "response_format"))
        assert accepts(grammar, "{}") and accepts(grammar, '{"a": 1}') == takes_more


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ({"type": "object", "properties": {}, "minProperties": 1}, "#/minProperties"),
        ({"not": {"type": "string"}}, "#/not"),
        ({"type": "object", "properties": {"a/b": {"type": "array", "uniqueItems": True}}}, "#/properties/a~1b/uniqueItems"),
        ({"type": "number", "multipleOf": 3}, "#/multipleOf"),
        ({"type": "string", "maxLength": 10_001}, "#/maxLength"),
        ({"type": "string", "minLength": 4, "maxLength": 3}, "#/maxLength"),
        ({"type": "string", "pattern": "(?=a)b"}, "#/pattern"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "#/pattern"),
        ({"type": "string", "format": "regex"}, "#/format"),
        ({"type": "string", "format": ["date"]}, "#/format"),
        ({"items": {"type": "strnig"}}, "#/items/type"),
        ({"$ref": "#/$defs/no"}, "#/$ref"),
        ({"$ref": "http://x/y"}, "#/$ref"),
        ({"anyOf": [{"$ref": "#"}]}, "#/anyOf/0/$ref"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "#/$defs/b/$ref"),
        ({"allOf": [{"type": "string"}, {"minLength": 3}]}, "#/allOf"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "#/oneOf"),
        ({"anyOf": [{"type": "string"}], "type": "string"}, "#/type"),
        ({"type": "object", "required": ["x"], "additionalProperties": False}, "#/required"),
        ({"type": "object", "properties": {"a": {}}, "required": ["a"], "maxProperties": 0}, "#/maxProperties"),
        ({"enum": ["a"], "type": "integer"}, "#/enum"),
        ({"type": "integer", "minimum": 1.2, "maximum": 1.8}, "#"),
        ({"type": "integer", "minimum": 10**15}, "#/minimum"),
        ({"type": "number", "exclusiveMaximum": -1e30, "minimum": -1e40}, "#/exclusiveMaximum"),
        ({"properties": {"a": False}}, "#/properties/a"),
        ([], "#"),
        ({"if": {}, "then": {}}, "#/if"),
    ],
)
def test_what_cannot_be_held_is_refused_with_its_path(schema: Any, path: str) -> None:
    with pytest.raises(RequestError) as caught:
        of_schema(schema, "response_format")
    assert f"at '{path}'" in str(caught.value)
    assert caught.value.param == "response_format"
    assert caught.value.code in ("invalid_json_schema", "invalid_grammar")


def test_a_schema_too_deep_or_too_large_is_refused() -> None:
    deep: Any = {}
    for _ in range(200):
        deep = {"items": deep}
    wide = {"properties": {f"p{i}": {"enum": [i]} for i in range(3000)}}
    chain = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(500)}
    for schema in (deep, wide, {"$ref": "#/$defs/d0", "$defs": chain}):
        with pytest.raises(RequestError, match="cannot be enforced"):
            of_schema(schema, "response_format")
