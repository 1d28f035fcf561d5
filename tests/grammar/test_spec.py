"""Choices, grammars of the client's own, and where a text may end."""

from __future__ import annotations

import pytest

from model_core.errors import RequestError
from model_core.grammar.matcher import Matcher
from model_core.grammar.spec import of_choice, of_ebnf
from tests.grammar.walks import SPECIAL, STOP, accepts, allowed, compiled


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
