"""Choices, grammars of the client's own, and calls of tools in free text."""

from __future__ import annotations

import pytest

from model_core.errors import RequestError
from model_core.grammar.matcher import Matcher
from model_core.grammar.spec import Call, of_choice, of_ebnf, of_tools
from tests.grammar.walks import SPECIAL, STOP, accepts, allowed, compiled

X = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
CALLS = [Call('{"name": "f", "arguments": ', X, "}"),
         Call('{"name": "g", "arguments": ', {"type": "object", "additionalProperties": False}, "}")]  # fmt: skip
F, G = '{"name": "f", "arguments": {"x": 3}}', '{"name": "g", "arguments": {}}'


def test_choices() -> None:
    grammar = compiled(of_choice(["yes", "no", 'a "quoted"\nline', "é😀"], "structured_outputs.choice"))
    for choice in ("yes", "no", 'a "quoted"\nline', "é😀"):
        assert accepts(grammar, choice)
    assert not accepts(grammar, "yesno") and not accepts(grammar, "y")
    for bad in ([], ["a", ""], ["\ud800"], ["x"] * 5000):
        with pytest.raises(RequestError):
            of_choice(bad, "structured_outputs.choice")


def test_a_grammar_of_the_client() -> None:
    assert accepts(compiled(of_ebnf('root ::= "a" more\nmore ::= "" | "," root', "structured_outputs.grammar")), "a,a,a")


@pytest.mark.parametrize("grammar", ["root ::= missing", "not a grammar", 'start ::= "a"', 'root ::= "a', "  "])
def test_a_wrong_grammar_is_refused(grammar: str) -> None:
    with pytest.raises(RequestError) as caught:
        compiled(of_ebnf(grammar, "structured_outputs.grammar"))
    assert caught.value.param == "structured_outputs.grammar" and caught.value.code == "invalid_grammar"


def test_calls_in_free_text() -> None:
    grammar = compiled(of_tools(CALLS, "tools", begin="<tool_call>\n", end="\n</tool_call>", free_text=True))
    block = f"<tool_call>\n{F}\n</tool_call>"
    for good in ("", "Just text. <tool", block, f"Let me see.\n{block}\n<tool_call>\n{G}\n</tool_call> done"):
        assert accepts(grammar, good)
    for bad in (f"<tool_call>\n{F}", "<tool_call>\nno", block.replace("3", '"3"')):
        assert not accepts(grammar, bad)
    once = compiled(of_tools(CALLS, "tools", begin="<tool_call>\n", end="\n</tool_call>", free_text=True, several=False))
    assert accepts(once, f"Hm. {block}") and not accepts(once, f"{block} more")


def test_calls_that_must_come() -> None:
    hermes = compiled(of_tools(CALLS, "tools", begin="<tool_call>\n", end="\n</tool_call>\n"))
    assert accepts(hermes, f"<tool_call>\n{F}\n</tool_call>\n<tool_call>\n{G}\n</tool_call>\n")
    assert not accepts(hermes, "") and not accepts(hermes, "text")
    llama = compiled(of_tools(CALLS[:1], "tools", several=False))
    assert accepts(llama, F) and not accepts(llama, F + F) and not accepts(llama, G)
    mistral = compiled(of_tools(CALLS, "tools", begin="[TOOL_CALLS][", between=", ", end="]", several=False))
    assert accepts(mistral, f"[TOOL_CALLS][{F}, {G}]") and not accepts(mistral, "[TOOL_CALLS][]")


def test_the_end() -> None:
    matcher = Matcher(compiled(of_choice(["ab", "abc"], "x")), frozenset([STOP]))
    assert STOP not in allowed(matcher)
    matcher.follow(list(b"PROMPTab"), start=6)
    assert set(allowed(matcher)) == {STOP, ord("c")}
    matcher.follow(list(b"abc"))
    assert allowed(matcher) == [STOP]
    matcher.follow([*b"abc", ord("d")])
    assert matcher.failure == "token 100 at place 3 of the output does not follow the grammar"
    assert allowed(matcher) == []


def test_stop_ids_of_the_request_only_where_the_text_may_end() -> None:
    matcher = Matcher(compiled(of_choice(["abab"], "x")), frozenset([ord("b"), SPECIAL]))
    matcher.follow([ord("a")])
    assert ord("b") not in allowed(matcher)
    longer = Matcher(compiled(of_choice(["a", "ab"], "x")), frozenset([ord("b"), SPECIAL]))
    longer.follow([ord("a")])
    assert {ord("b"), SPECIAL} <= set(allowed(longer))
