"""Grammars of calls: what a model of no sense at all writes under them is read as calls with arguments that fit."""

from __future__ import annotations

import json

import pytest
from jsonschema import Draft202012Validator

from deployments.protocol.tools import Function
from deployments.tools.family import FAMILIES
from deployments.tools.grammar import ARRAY, check
from deployments.tools.pieces import Call, joined
from model_core.errors import RequestError
from tests.grammar.walks import accepts, compiled, write

SCHEMA = {"type": "object", "required": ["a"], "properties": {
    "a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["</tool_call>", "}", '"; ']}}}  # fmt: skip
FUNCTIONS = [Function(name="f", parameters=SCHEMA), Function(name="g"), Function(name="h", parameters={"not": {}})]
SCHEMAS = {"f": SCHEMA, "g": {"type": "object", "maxProperties": 0}, "h": {"type": "object"}}
FORMS = [(name, family.form or ARRAY) for name, family in FAMILIES.items()] + [("hermes", ARRAY)]
F, G = '{"name": "f", "arguments": {"a": 1}}', '{"name": "g", "arguments": {}}'


def read(family, form, text):
    parser = FAMILIES[family].parser(frozenset(SCHEMAS), form=form)
    return joined([*parser.feed(text), *parser.finish()])


@pytest.mark.parametrize(("family", "form"), FORMS, ids=lambda one: one if isinstance(one, str) else "")
@pytest.mark.parametrize("several", [False, True])
def test_forced_calls_always_parse(family, form, several):
    grammar = compiled(form.forced(FUNCTIONS, several=several))
    ended = 0
    for seed in range(12):
        text, is_whole = write(grammar, seed)
        if not is_whole:
            continue
        blocks = read(family, form, text.decode())
        assert all(isinstance(call, Call) and call.is_whole for call in blocks) and blocks, text
        assert several or len(blocks) == 1
        for call in blocks:
            Draft202012Validator(SCHEMAS[call.name]).validate(json.loads(call.arguments))
        ended += 1
    assert ended >= 4


@pytest.mark.parametrize(("family", "one", "two"), [
    ("hermes", f"<tool_call>\n{F}\n</tool_call>", f"<tool_call>\n{F}\n</tool_call>\n<tool_call>\n{G}\n</tool_call>"),
    ("llama3", F.replace("arguments", "parameters"), f"{F}; {G}".replace("arguments", "parameters")),
    ("mistral", f"[TOOL_CALLS][{F}]", f"[TOOL_CALLS][{F}, {G}]"),
    ("pythonic", f"[{F}]", f"[{F}, {G}]"),
])  # fmt: skip
def test_they_have_the_familys_form(family, one, two):
    form = FAMILIES[family].form or ARRAY
    single, several = (compiled(form.forced(FUNCTIONS, several=several)) for several in (False, True))
    assert accepts(single, one) and accepts(several, one) and accepts(several, two) and not accepts(single, two)
    assert not accepts(several, "") and not accepts(several, "Well, " + one)
    if form is ARRAY:
        return
    free, once = (compiled(form.free(FUNCTIONS, several=several)) for several in (True, False))
    for text in ("", "Just text. <tool", one, "Well. " + one):
        assert accepts(free, text) and accepts(once, text)
    assert accepts(free, two) and not accepts(once, two)
    assert not accepts(free, one.replace("1", '"1"')) and not accepts(free, one.replace('"f"', '"other"'))


def test_control_tokens_cannot_be_written():
    for family, tags, own in (("hermes", {"<tool_call>"}, False), ("mistral", {"[TOOL_CALLS]"}, False), ("llama3", set(), True),
                              ("llama3", {"<|python_tag|>"}, True), ("mistral", {"[ARGS]"}, True), ("pythonic", set(), False)):
        assert (FAMILIES[family].own_form(frozenset(tags)) is not None) == own


@pytest.mark.parametrize("schema", [{"not": {}}, {"type": "string"}, {"anyOf": [{"type": "object"}]}, {"$ref": "#/$defs/x"}])
def test_a_strict_schema_is_enforced_or_refused(schema):
    with pytest.raises(RequestError) as caught:
        check(Function(name="f", parameters=schema, strict=True), "tools[3]")
    assert caught.value.param == "tools[3]" and caught.value.code == "invalid_json_schema"
    with pytest.raises(RequestError):
        ARRAY.forced([Function(name="f", parameters=schema, strict=True)], several=True)
    check(Function(name="f", parameters=schema), "tools[3]")
    ARRAY.forced([Function(name="f", parameters=schema)], several=True)
