"""Regular expressions and bounds of numbers as grammars, against Python's own."""

from __future__ import annotations

import json
import re
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_core.errors import RequestError
from model_core.grammar.ebnf import Rules
from model_core.grammar.number import integers, numbers
from model_core.grammar.spec import GrammarSpec, of_regex, of_schema
from tests.grammar.walks import accepts, compiled, write

ATOMS = st.sampled_from(["a", "b", "é", r"\.", ".", r"\d", r"\w", r"\s", r"[ab]", r"[^a]", r"[^\d]", r"[a-c\-]", r"\x41", "-"])


def _larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    counts = st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{2,}", "*?"])
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, counts).map(lambda pair: f"({pair[0]}){pair[1]}"),
    )


EXPRESSIONS = st.recursive(ATOMS, _larger, max_leaves=5)


@settings(max_examples=100, deadline=None)
@given(pattern=EXPRESSIONS, seed=st.integers(0, 2**32), texts=st.lists(st.text("ab1 -./Aé", max_size=5), max_size=8))
def test_like_re(pattern: str, seed: int, texts: list[str]) -> None:
    grammar = compiled(of_regex(pattern, "structured_outputs.regex"))
    inside = compiled(of_schema({"type": "string", "pattern": pattern}, "response_format"))
    answer, ended = write(grammar, seed, 60)
    assert not ended or re.fullmatch(pattern, answer.decode())
    answer, ended = write(inside, seed, 60)
    assert not ended or re.fullmatch(pattern, json.loads(answer))
    narrow = r"[^\d]" in pattern  # what is not a digit is left to ASCII
    for text in texts:
        matches = re.fullmatch(pattern, text, re.ASCII) is not None
        if not narrow or not matches:
            assert accepts(grammar, text) == matches
            assert accepts(inside, json.dumps(text, ensure_ascii=False)) == matches


@pytest.mark.parametrize("pattern", ["(?i)a", "(?=a)b", "(?P<x>a)", r"(a)\1", r"\bx", "a^b", "a$b", "(^a)", "a{1,10001}",
                                     "a**", "a++", "*a", "(a", "a)", "[a", "[]a]", r"\p{L}", "[[:alpha:]]", "[a&&b]", "{,3}",
                                     "[z-a]", "a{3,2}", "\\", "(" * 40 + ")" * 40])  # fmt: skip
def test_what_cannot_be_followed_is_refused(pattern: str) -> None:
    with pytest.raises(RequestError) as caught:
        of_regex(pattern, "structured_outputs.regex")
    assert caught.value.param == "structured_outputs.regex"


def test_anchors_at_the_ends_mean_what_is_meant_anyway() -> None:
    grammar = compiled(of_regex("^ab$|^c$", "structured_outputs.regex"))
    assert accepts(grammar, "ab") and accepts(grammar, "c") and not accepts(grammar, "abc")


BOUNDS = st.one_of(st.none(), st.tuples(st.decimals(-2000, 2000, places=3) | st.integers(-30, 30).map(Decimal), st.booleans()))


@settings(max_examples=100, deadline=None)
@given(low=BOUNDS, high=BOUNDS, near=st.lists(st.decimals(-3, 3, places=4), max_size=12))
def test_numbers_between_bounds(low, high, near: list[Decimal]) -> None:
    def inside(value: Decimal) -> bool:
        above = low is None or value > low[0] or (value == low[0] and not low[1])
        return above and (high is None or value < high[0] or (value == high[0] and not high[1]))

    body = numbers(low, high)
    if body is None:
        assert low is not None and high is not None and (low[0] > high[0] or low[0] == high[0])
        return
    grammar = compiled(GrammarSpec(Rules().text(body), "x"))
    bases = [Decimal(0), *(bound[0] for bound in (low, high) if bound)]
    for base in bases:
        for offset in [Decimal(0), *near]:
            written = f"{base + offset:f}"
            if not written.startswith("-") or written.strip("-0."):
                assert accepts(grammar, written) == inside(base + offset), written


@settings(max_examples=100, deadline=None)
@given(low=st.none() | st.integers(-12345, 12345), high=st.none() | st.integers(-12345, 12345))
def test_integers_between_bounds(low: int | None, high: int | None) -> None:
    body = integers(low, high)
    if body is None:
        assert low is not None and high is not None and low > high
        return
    grammar = compiled(GrammarSpec(Rules().text(body), "x"))
    for base in {0, 9, -9, 100, -100, low or 0, high or 0}:
        for value in (base - 1, base, base + 1):
            assert accepts(grammar, str(value)) == ((low is None or low <= value) and (high is None or value <= high))
    assert not accepts(grammar, "-0") and not accepts(grammar, "007")


def test_sets_that_repeat_are_starred() -> None:
    """In any other form their masks take 14 times as long."""
    text = of_regex(r"[a-c]+x{2,}\d*(ab)+", "structured_outputs.regex").text
    assert text == "root ::= [a-c] [a-c]* [x]{2,2} [x]* [0-9]* ([a] [b])+"
