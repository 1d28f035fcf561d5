"""Grammars of calls: what a model of no sense at all writes under them is read as calls with arguments that fit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from jsonschema import Draft202012Validator

from deployments.protocol.tools import Function
from deployments.tools import mistral
from deployments.tools.family import FAMILIES
from deployments.tools.grammar import check
from deployments.tools.pieces import Call, joined
from model_core.errors import RequestError
from model_core.grammar.calls import Control
from model_core.grammar.spec import of_json_object, of_schema
from tests.grammar.walks import OTHER, SPECIAL, accepts, compiled, write

SCHEMA = {"type": "object", "required": ["a"], "properties": {
    "a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["</tool_call>", "}", '"; ']}}}  # fmt: skip
FUNCTIONS = [Function(name="f", parameters=SCHEMA), Function(name="g"), Function(name="h", parameters={"not": {}})]
SCHEMAS = {"f": SCHEMA, "g": {"type": "object", "maxProperties": 0}, "h": {"type": "object"}}
OBJECT = {"type": "object", "properties": {"a": {"type": "string"}, "name": {"enum": ["f"]}}, "required": ["name"]}
CONTROL = {
    "hermes": (Control(SPECIAL, "<tool_call>"), Control(OTHER, "</tool_call>")),
    "mistral": (Control(SPECIAL, "[TOOL_CALLS]"), Control(OTHER, "[ARGS]")),
    "llama3": (Control(SPECIAL, "<|python_tag|>"),),
    "pythonic": (Control(SPECIAL, "<|python_start|>"),),
}
NEWER = replace(FAMILIES["mistral"], form=mistral.NEWER)
ALL = [(one, control) for name, one in FAMILIES.items() for control in ((), CONTROL[name])] + [(NEWER, CONTROL["mistral"])]
F, G = '{"name": "f", "arguments": {"a": 1}}', '{"name": "g", "arguments": {}}'


def walk(family, control, spec, *, either=False, begin=""):
    """Blocks of texts that came to an end."""
    grammar, shown = compiled(spec), {one.id: one.text for one in control}
    hidden = frozenset(one.text for one in control)
    for seed in range(12):
        text, is_whole = write(grammar, seed, begin=begin, shown=shown)
        if is_whole:
            parser = family.parser(frozenset(SCHEMAS), hidden, guided=True, either=either)
            yield text, joined([*parser.feed(text.decode("utf-8", "replace")), *parser.finish()])


def check_calls(blocks):
    for call in blocks:
        assert call.is_whole
        Draft202012Validator(SCHEMAS[call.name]).validate(json.loads(call.arguments))


@pytest.mark.parametrize(("family", "control"), ALL, ids=lambda one: getattr(one, "name", ""))
@pytest.mark.parametrize("several", [False, True])
def test_forced_calls_always_parse(family, control, several):
    ended = 0
    for text, blocks in walk(family, control, family.form.forced(FUNCTIONS, several=several, control=control)):
        assert all(isinstance(call, Call) for call in blocks) and blocks, text
        assert several or len(blocks) == 1
        check_calls(blocks)
        ended += 1
    assert ended >= 4


def test_a_function_without_parameters_takes_none():
    for parameters in (None, {}, {"type": "object", "properties": {}}):
        grammar = compiled(FAMILIES["hermes"].form.forced([Function(name="g", parameters=parameters)], several=False))
        assert accepts(grammar, f"<tool_call>\n{G}\n</tool_call>")
        more = G.replace("{}", '{"a": 1}')
        assert not accepts(grammar, f"<tool_call>\n{more}\n</tool_call>")


@pytest.mark.parametrize(("family", "control"), ALL, ids=lambda one: getattr(one, "name", ""))
def test_what_is_read_as_a_call_in_free_text_is_as_it_should_be(family, control):
    begins = {"hermes": "Hm. <tool_call>", "mistral": "Hm. [TOOL_CALLS]", "llama3": 'Hm. {"name": ', "pythonic": "["}
    ended = called = 0
    for several in (False, True):
        spec = family.form.free(FUNCTIONS, several=several, control=control)
        for begin in ("", begins[family.name] if not spec.marks else "Hm."):
            for _, blocks in walk(family, control, spec, begin=begin):
                found = [block for block in blocks if isinstance(block, Call)]
                check_calls(found)
                ended, called = ended + 1, called + bool(found)
    assert ended >= 20 and called >= 4


@pytest.mark.parametrize("text", [
    '{"name":"f", "parameters": {"a": "x"}}', '{ "name": "f", "parameters": {"a": "x"}}',
    '<|python_tag|>{"parameters": {"a": "x"}, "name": "f"}',
])  # fmt: skip
def test_what_the_grammar_takes_for_text_is_not_read_as_a_call(text):
    family = FAMILIES["llama3"]
    assert accepts(compiled(family.form.free(FUNCTIONS, several=True)), text)
    for guided, found in ((True, str), (False, Call)):
        parser = family.parser(frozenset(SCHEMAS), guided=guided)
        assert isinstance(joined([*parser.feed(text), *parser.finish()])[0], found)


@pytest.mark.parametrize(("family", "control"), ALL, ids=lambda one: getattr(one, "name", ""))
@pytest.mark.parametrize("answer", [of_json_object("x"), of_schema(OBJECT, "x")], ids=["any", "schema"])
def test_calls_or_an_answer_of_a_form(family, control, answer):
    spec = family.form.beside(answer, FUNCTIONS, several=True, control=control)
    call = family.form.beginnings(["f"])[0]
    kinds = set()
    for begin in ("", "{") if spec.marks else ("{", call):
        for text, blocks in walk(family, control, spec, either=True, begin=begin):
            kinds.add(type(blocks[0]))
            if isinstance(blocks[0], str):
                assert blocks == [text.decode()]
                Draft202012Validator(OBJECT if answer.text != of_json_object("x").text else {}).validate(json.loads(text))
            else:
                check_calls(blocks)
    assert kinds == {str, Call}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_full_of_calls_is_still_an_answer(family):
    one = {"hermes": f"<tool_call>{F}</tool_call>", "mistral": f"[TOOL_CALLS][{F}]", "pythonic": "[f(a=1)]", "llama3": "{}"}
    text = json.dumps({"a": [one[family]], "b": {"name": "f", "parameters": {"a": 1}, "arguments": {}}}) + "\n"
    for size in (1, 7, 1000):
        parser = FAMILIES[family].parser(frozenset(SCHEMAS), guided=True, either=True)
        pieces = [piece for at in range(0, len(text), size) for piece in parser.feed(text[at : at + size])]
        assert joined([*pieces, *parser.finish()]) == [text]


@pytest.mark.parametrize(("family", "control"), ALL, ids=lambda one: getattr(one, "name", ""))
def test_a_cut_beginning_is_content_but_for_control_tokens(family, control):
    hidden = frozenset(one.text for one in control)
    beginning = family.form.beginnings(["f"])[0]
    for size in range(1, len(beginning)):
        parser = family.parser(frozenset(SCHEMAS), hidden, guided=True, either=True)
        shown = beginning[:size]
        found = joined([*parser.feed(shown), *parser.finish()])
        for tag in hidden:
            shown = shown.replace(tag, "")
        assert found == ([shown] if shown else [])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", [dict(alone=True), dict(either=True)], ids=str)
def test_of_calls_that_must_be_calls_a_cut_one_is_not_content(family, way):
    texts = {"hermes": f"<tool_call>\n{F}\n</tool_call>\n<tool_call>\n{F}", "mistral": f"[TOOL_CALLS][{F}, {F}",
             "llama3": "; ".join([F.replace("arguments", "parameters")] * 2), "pythonic": "[f(a=1), f(a=1"}  # fmt: skip
    text = texts[family]
    whole = FAMILIES[family].form.beginnings(["f"])[0]
    for size in range(len(whole), len(text)):
        parser = FAMILIES[family].parser(frozenset(SCHEMAS), guided=True, **way)
        found = joined([*parser.feed(text[:size]), *parser.finish()])
        assert all(isinstance(block, Call) and block.name == "f" for block in found) and len(found) <= 2


@pytest.mark.parametrize(("family", "one", "two"), [
    ("hermes", f"<tool_call>\n{F}\n</tool_call>", f"<tool_call>\n{F}\n</tool_call>\n<tool_call>\n{G}\n</tool_call>"),
    ("llama3", F.replace("arguments", "parameters"), f"{F}; {G}".replace("arguments", "parameters")),
    ("mistral", f"[TOOL_CALLS][{F}]", f"[TOOL_CALLS][{F}, {G}]"),
    ("newer", '[TOOL_CALLS]f[ARGS]{"a": 1}', '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}'),
    ("pythonic", "[f(a=1)]", "[f(a=1), g()]"),
])  # fmt: skip
def test_they_have_the_familys_form(family, one, two):
    form = (NEWER if family == "newer" else FAMILIES[family]).form
    single, several = (compiled(form.forced(FUNCTIONS, several=several)) for several in (False, True))
    assert accepts(single, one) and accepts(several, one) and accepts(several, two) and not accepts(single, two)
    assert not accepts(several, "") and not accepts(several, "Well, " + one)
    free, once = (compiled(form.free(FUNCTIONS, several=several)) for several in (True, False))
    for text in ("", "Just text. <tool", one, "Well. " + one):
        assert accepts(free, text) and accepts(once, text)
    assert accepts(free, two) and not accepts(once, two)
    assert not accepts(free, one.replace("1", '"1"')) and not accepts(free, one.replace("f", "other", 1))


def test_by_name_only_words_can_be_written():
    form = FAMILIES["pythonic"].form
    with pytest.raises(RequestError, match="'1f'"):
        form.forced([Function(name="1f")], several=True)
    spaced = {"type": "object", "properties": {"a b": {"type": "integer"}, "c": {"type": "integer"}}}
    with pytest.raises(RequestError, match="'#/properties/a b'"):
        form.free([Function(name="f", parameters=spaced, strict=True)], several=True)
    loose = compiled(form.forced([Function(name="f", parameters=spaced)], several=True))
    assert accepts(loose, '[f(c={"x": [null]})]') and accepts(loose, "[f()]")


@pytest.mark.parametrize("schema", [{"not": {}}, {"type": "string"}, {"anyOf": [{"type": "object"}]}, {"$ref": "#/$defs/x"}])
def test_a_strict_schema_is_enforced_or_refused(schema):
    with pytest.raises(RequestError) as caught:
        check(Function(name="f", parameters=schema, strict=True), "tools[3]")
    assert caught.value.param == "tools[3]" and caught.value.code == "invalid_json_schema"
    with pytest.raises(RequestError):
        FAMILIES["hermes"].form.forced([Function(name="f", parameters=schema, strict=True)], several=True)
    check(Function(name="f", parameters=schema), "tools[3]")
    FAMILIES["hermes"].form.forced([Function(name="f", parameters=schema)], several=True)
