"""Repetitions beyond what the library counts right by itself: exactly so many, and no wrong token in any mask."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model_core.grammar.ebnf import CHAIN, GROUP, MAX_REPEAT, Rules, chained, repeated
from model_core.grammar.matcher import Matcher
from model_core.grammar.spec import GrammarSpec, of_regex, of_schema
from tests.grammar.walks import STOP, accepts, allowed, by_bytes, compiled

BOUNDS = st.tuples(st.integers(0, MAX_REPEAT), st.integers(0, MAX_REPEAT)).map(sorted)


@settings(max_examples=25, deadline=None)
@given(bounds=BOUNDS, others=st.lists(st.integers(0, MAX_REPEAT), max_size=3), is_open=st.booleans())
@example(bounds=[0, 128], others=[], is_open=False)
@example(bounds=[101, 201], others=[], is_open=False)
@example(bounds=[0, 200], others=[100, 199], is_open=False)
@example(bounds=[MAX_REPEAT, MAX_REPEAT], others=[], is_open=True)
def test_so_many_and_no_more(bounds, others, is_open):
    low, high = bounds
    grammar = compiled(GrammarSpec(Rules().text(f'"<" {repeated("[ab]", low, None if is_open else high)} ">"'), "x"))
    for count in {low - 1, low, low + 1, low + GROUP, high - 1, high, high + 1, *others} - {-1}:
        assert accepts(grammar, f"<{'ab' * (count // 2)}{'a' * (count % 2)}>") == (low <= count and (is_open or count <= high))


@pytest.mark.parametrize("schema", [
    {"type": "string", "maxLength": 10_000}, {"type": "string", "minLength": 9_950, "maxLength": 10_000},
    {"type": "string", "maxLength": 129}, {"type": "string", "minLength": 250, "maxLength": 300},
    {"type": "string", "minLength": 383, "maxLength": 383}, {"type": "string", "minLength": 400},
    {"type": "string", "maxLength": CHAIN}, {"type": "string", "minLength": 1, "maxLength": CHAIN + 1},
    {"type": "string", "pattern": "^.{5,1000}$"}, {"type": "string", "pattern": "^[a-c]{130,300}-é{200}$"},
    {"type": "string", "pattern": "^(a[bc]|é€){130,250}x?$"},
    {"type": "string", "pattern": r"^(ab{2,200}){3}$"}, {"type": "string", "pattern": r"^([a-c]{1,3} ){150,}$"},
    {"type": "array", "items": {"enum": ["ab", 10]}, "minItems": 120, "maxItems": 250},
], ids=str)  # fmt: skip
def test_the_masks_are_right_at_every_border(schema):
    """Walks of one seed each, compared where groups end and everywhere in between now and then."""
    grammar = compiled(of_schema(schema, "x"))
    chance, matcher, output, compared = random.Random(1), Matcher(grammar, frozenset([STOP])), list[int](), 0
    for step in range(10_050 if schema.get("maxLength") else 500):
        ids = allowed(matcher)
        if step % GROUP in (0, GROUP - 2, GROUP - 1, 1) and (step < 520 or step > 9_890):
            assert set(ids) - {STOP} == by_bytes(grammar, output)
            compared += 1
        going_on = [i for i in ids if i < 128 and i != ord('"') and chr(i) != "]"] or [i for i in ids if i != STOP]
        if not going_on:
            break
        output.append(chance.choice(going_on))
        matcher.follow(output)
        assert matcher.failure is None
    assert compared >= 4


@pytest.mark.parametrize("low, high", [(0, 1), (1, 1), (0, 3), (2, 5), (4, None), (1, None), (0, None)])
def test_a_chain_is_as_long_as_it_may_be(low, high):
    rules = Rules()
    grammar = compiled(GrammarSpec(rules.text(f'"<" {chained(rules, "[ab]", low, high)} ">"'), "x"))
    found = [count for count in range(8) if accepts(grammar, f"<{'ab' * 4}"[: count + 1] + ">")]
    assert found == [count for count in range(8) if low <= count and (high is None or count <= high)]


@pytest.mark.parametrize("spec, slow", [
    (of_regex("[a-z]{1000}", "x"), True), (of_regex("[a-z]{300}", "x"), True), (of_regex("([a-c]{1,3} ){150,}", "x"), True),
    (of_schema({"type": "string", "maxLength": 5000}, "x"), True), (of_schema({"type": "string", "maxLength": 500}, "x"), True),
    (GrammarSpec("root ::= [a-z]{0, 999}", "x"), True), (of_regex("[a-z]{60}", "x"), False),
    (of_schema({"type": "string", "maxLength": 100}, "x"), False), (of_schema({"type": "object"}, "x"), False),
    (of_schema({"type": "object", "properties": {f"p{n}": {"enum": [n, "a"]} for n in range(300)}}, "x"), False),
], ids=lambda one: one.text[:40] if isinstance(one, GrammarSpec) else one)  # fmt: skip
def test_those_that_count_far_are_known_as_slow(spec, slow):
    """Not those of many rules."""
    assert compiled(spec).slow == slow


def test_strings_share_the_rules_that_count_them():
    texts = [of_schema({"type": "object", "properties": {f"p{n}": {"type": "string", "maxLength": n} for n in lengths},
                        "required": [f"p{n}" for n in lengths]}, "x").text for lengths in ([300], [300, 200, 257])]  # fmt: skip
    assert 300 < texts[0].count("::=") < 320 and texts[1].count("::=") < texts[0].count("::=") + 10
    assert "{" not in texts[1].replace('"{"', "")


@pytest.mark.parametrize("schema", [{"type": "string", "maxLength": MAX_REPEAT + 1}, {"type": "string", "pattern": "a{10001}"}])
def test_the_limit(schema):
    with pytest.raises(Exception, match="10000"):
        of_schema(schema, "x")


def test_they_compile_at_once():
    began = time.monotonic()
    many = {f"p{i}": {"type": "string", "minLength": i, "maxLength": MAX_REPEAT - i} for i in range(50)}
    compiled(of_schema({"type": "object", "properties": many, "required": list(many)}, "x"))
    compiled(of_regex(r"(\d{100,1000}-){10,1000}", "x"))
    assert time.monotonic() - began < 10
