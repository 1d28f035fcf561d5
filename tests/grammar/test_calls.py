"""Calls of tools: alone, in free text, in place of an answer; by tags that are text and tags that are control tokens."""

from __future__ import annotations

import pytest

from model_core.errors import RequestError
from model_core.grammar.calls import (
    Block,
    Call,
    Control,
    of_answer_or_calls,
    of_calls,
    of_object_apart,
    of_text_or_calls,
    of_text_with_calls,
)
from model_core.grammar.ebnf import MARKS
from model_core.grammar.spec import of_choice, of_json_object, of_regex, of_schema
from tests.grammar.walks import OTHER, SPECIAL, accepts, compiled

X = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
NONE = {"type": "object", "additionalProperties": False}
F, G = '{"name": "f", "arguments": {"x": 3}}', '{"name": "g", "arguments": {}}'
PAIRS = (('{"name": "f", "arguments": ', X), ('{"name": "g", "arguments": ', NONE))
HERMES = tuple(Call(f"<tool_call>\n{head}", schema, "}\n</tool_call>") for head, schema in PAIRS)
PLAIN = tuple(Call(head, schema, "}") for head, schema in PAIRS)
MISTRAL = Block(PLAIN, "[TOOL_CALLS][", ", ", "]")
TOKENS = (Control(SPECIAL, "[TOOL_CALLS]"),)
TAGS = (Control(SPECIAL, "<tool_call>"), Control(OTHER, "</tool_call>"))
BY_NAME = Block((Call("f(", X, ")", keywords=True), Call("g(", NONE, ")", keywords=True)), "[", ", ", "]")


def test_in_free_text() -> None:
    grammar = compiled(of_text_with_calls(Block(HERMES), "tools", "<tool_call>", several=True))
    block = f"<tool_call>\n{F}\n</tool_call>"
    for good in ("", "Just text. <tool", block, f"Let me see.\n{block}\n<tool_call>\n{G}\n</tool_call> done"):
        assert accepts(grammar, good)
    for bad in (f"<tool_call>\n{F}", "<tool_call>no", block.replace("3", '"3"')):
        assert not accepts(grammar, bad)
    once = compiled(of_text_with_calls(Block(HERMES), "tools", "<tool_call>", several=False))
    assert accepts(once, f"Hm. {block}") and not accepts(once, f"{block} more")


def test_alone() -> None:
    hermes = compiled(of_calls(Block(HERMES, between="\n"), "tools"))
    assert accepts(hermes, f"<tool_call>\n{F}\n</tool_call>\n<tool_call>\n{G}\n</tool_call>")
    assert not accepts(hermes, "") and not accepts(hermes, "text")
    llama = compiled(of_calls(Block(PLAIN[:1]), "tools"))
    assert accepts(llama, F) and not accepts(llama, F + F) and not accepts(llama, G)
    mistral = compiled(of_calls(MISTRAL, "tools"))
    assert accepts(mistral, f"[TOOL_CALLS][{F}, {G}]") and not accepts(mistral, "[TOOL_CALLS][]")


def test_control_tokens_are_written_as_such_and_nowhere_else() -> None:
    block = Block(PLAIN, "[TOOL_CALLS][", ", ", "]", TOKENS)
    alone = compiled(of_calls(block, "tools"))
    assert accepts(alone, SPECIAL, f"[{F}, {G}]") and not accepts(alone, f"[TOOL_CALLS][{F}]")
    text = compiled(of_text_with_calls(block, "tools", "[TOOL_CALLS]", several=False))
    assert accepts(text, "Well, [TOOL_", SPECIAL, f"[{F}]") and accepts(text, "[TOOL_CALLS")
    assert not accepts(text, "[TOOL_CALLS]") and not accepts(text, SPECIAL) and not accepts(text, OTHER)
    assert not accepts(text, SPECIAL, f"[{F.replace('3', 'true')}]")
    both = compiled(of_text_with_calls(Block(HERMES, control=TAGS), "tools", "<tool_call>", several=True))
    assert accepts(both, "a", SPECIAL, f"\n{F}\n", OTHER, "b", SPECIAL, f"\n{G}\n", OTHER)
    assert not accepts(both, "a", OTHER) and not accepts(both, SPECIAL, f"\n{F}\n</tool_call>")
    anything = {"type": "object", "properties": {"s": {"type": "string"}}, "required": ["s"]}
    inside = compiled(of_calls(Block((Call("", anything, ""),), "[TOOL_CALLS]", control=TOKENS), "tools"))
    assert accepts(inside, SPECIAL, '{"s": "ab"}') and not accepts(inside, SPECIAL, '{"s": "a', SPECIAL, '"}')


def test_no_text_of_a_client_stands_for_a_control_token() -> None:
    mark = MARKS[0]
    for make, value in ((of_choice, [mark]), (of_regex, mark), (of_regex, f"[a{mark}]")):
        with pytest.raises(RequestError, match="last four code points"):
            make(value, "x")
    assert accepts(compiled(of_schema({"const": mark}, "x")), '"\\udbff\\udffc"')
    assert not accepts(compiled(of_regex("[^a]", "x")), mark)


def test_by_name() -> None:
    alone = compiled(of_calls(BY_NAME, "tools"))
    assert accepts(alone, "[f(x=3), g()]") and not accepts(alone, '[f(x="3")]') and not accepts(alone, "[f()]")
    text = compiled(of_text_or_calls(BY_NAME, "tools", " ,[<"))
    for good in ("", "Well, [f(x=3)]", "[f(x=3)]", "No."):
        assert accepts(text, good)
    for bad in (" [f(x=3)]", "[no", "[f(x=3)] more", "<tag>[f(x=true)]", "[", ","):
        assert not accepts(text, bad)
    assert compiled(of_text_or_calls(BY_NAME, "tools", " ,[<"))
    with pytest.raises(RequestError, match="'#/properties/a b'"):
        of_calls(Block((Call("f(", {"type": "object", "properties": {"a b": {}}}, ")", keywords=True),)), "tools")


def test_in_place_of_an_answer() -> None:
    format_ = {"type": "object", "properties": {"a": {"const": "[TOOL_CALLS]"}}, "required": ["a"]}
    for block, calls in ((MISTRAL, ["[TOOL_CALLS]"]), (Block(PLAIN, "[TOOL_CALLS][", ", ", "]", TOKENS), [SPECIAL])):
        grammar = compiled(of_answer_or_calls(of_schema(format_, "response_format"), block, "tools"))
        assert accepts(grammar, *calls, f"[{F}, {G}]") and accepts(grammar, '{"a": "[TOOL_CALLS]"}')
        for bad in ("", "{}", f"[{F}]", '{"a": "[TOOL_CALLS]"}[TOOL_CALLS]'):
            assert not accepts(grammar, bad)


def test_an_object_whose_first_member_has_another_name() -> None:
    grammar = compiled(of_object_apart("name", "x"))
    for good in ("{}", '{"": 1}', '{"n": 1}', '{"names": {"name": []}}', '{"a\\n": 1, "name": "f"}', '{"na\\"me": true}'):
        assert accepts(grammar, good)
    for bad in ('{"name": 1}', '{"name', '{"x": 1', "[]", '{"name": "f", "x": 1}'):
        assert not accepts(grammar, bad)


@pytest.mark.parametrize(("answer", "block"), [
    (of_json_object("response_format"), Block(PLAIN)),
    (of_schema({"properties": {"name": {"type": "string"}, "arguments": {}}}, "response_format"), Block(PLAIN)),
    (of_regex("(.|\\n)*", "response_format"), Block(HERMES)),
    (of_regex("(.|\\n)*", "response_format"), Block(HERMES, control=TAGS)),
    (of_choice(["yes", F + "!"], "response_format"), Block(PLAIN)),
])  # fmt: skip
def test_an_answer_that_could_be_taken_for_a_call_is_refused(answer, block) -> None:
    with pytest.raises(RequestError, match="tell them apart") as caught:
        compiled(of_answer_or_calls(answer, block, "tools"))
    assert caught.value.param == "response_format" and caught.value.code == "unsupported_parameter"


@pytest.mark.parametrize("answer", [
    of_schema({"properties": {"name": {"type": "string"}, "age": {}}}, "x"), of_schema({"properties": {"arguments": {}}}, "x"),
    of_regex("[a-z ]*", "x"), of_choice(["yes", "root ::= no"], "x"), of_schema({"type": "array", "items": {}}, "x"),
    of_object_apart("name", "x"),
])  # fmt: skip
def test_an_answer_that_could_not(answer) -> None:
    for block in (Block(PLAIN), Block(HERMES), MISTRAL, BY_NAME):
        compiled(of_answer_or_calls(answer, block, "tools"))
