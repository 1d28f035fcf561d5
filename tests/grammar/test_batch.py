"""The masks of a step: those of one matcher at a time, however they are filled."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest

from benchmarks.texts import made_up
from model_core.grammar import batch, beside, matcher
from model_core.grammar.batch import MaskFiller
from model_core.grammar.calls import Block, Call, Control, of_calls
from model_core.grammar.matcher import Compiled, Matcher, Vocabulary
from model_core.grammar.spec import GrammarSpec, of_json_object, of_regex
from tests.grammar.walks import SPECIAL, STOP, VOCABULARY, compiled

CALLS = of_calls(Block((Call("<call>", {"type": "object"}, ""),), between="", control=(Control(SPECIAL, "<call>"),)), "x")
SPECS = (of_json_object("x"), of_regex("[a-c]{2,9}x*", "x"), of_regex(r"\\d+", "x"), CALLS)
GRAMMARS = [compiled(spec) for spec in SPECS]
WORDS = GrammarSpec('root ::= (word " ")*\nword ::= [a-z]{1,5}', "x")
PROMPT = [5, 6, 7]


class Walk:
    """A sequence by random choices, and its matcher; stop ids of which one may stand in a text."""

    def __init__(self, number: int) -> None:
        self.chance, stops = random.Random(number), frozenset((STOP, ord("c")) if number % 2 else (STOP,))
        self.matcher, self.alone = (Matcher(GRAMMARS[number % 4], stops) for _ in range(2))
        self.tokens = list(PROMPT)

    def mask(self) -> np.ndarray:
        masks = np.zeros((1, VOCABULARY.words), dtype=np.int32)
        self.alone.follow(self.tokens, len(PROMPT))
        self.alone.fill(masks, 0)
        return masks[0]

    def go_on(self, mask: np.ndarray) -> bool:
        ids = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[: VOCABULARY.size]).tolist()
        self.tokens.append(self.chance.choice([token for token in ids if token != STOP] or ids))
        return self.tokens[-1] not in (STOP, ord("c"))


@pytest.mark.parametrize("way", ["alone", "threads", "one by one"])
def test_they_are_those_of_each_alone(way, monkeypatch) -> None:
    """Also of a row that has not begun, of one that has more than a token to read, and of one whose token was not allowed."""
    monkeypatch.setattr(batch, "_SHARE_S", 1e-9 if way == "threads" else 1e9)
    monkeypatch.setattr(batch, "SLOW_S", -1.0 if way == "one by one" else 1e9)
    filler, walks = MaskFiller(), [Walk(number) for number in range(9)]
    masks = np.full((12, VOCABULARY.words), 77, dtype=np.int32)
    for step in range(12):
        if step == 5:
            walks.append(Walk(9))
        if step == 8:
            walks[2].tokens.append(0)
        chosen = walks if step % 4 else walks[::2]
        filler.fill([walk.matcher for walk in chosen], [(walk.tokens, len(PROMPT)) for walk in chosen], masks)
        expected = [walk.mask() for walk in chosen]
        assert all((masks[row] == mask).all() for row, mask in enumerate(expected)), step
        assert step or (masks[len(chosen) :] == 77).all()
        walks = [walk for walk, mask in zip(chosen, expected, strict=True) if not mask.any() or walk.go_on(mask)] + [
            walk for walk in walks if walk not in chosen]  # fmt: skip
        assert len(walks) > 3


def test_a_grammar_that_takes_too_long_is_found_among_others(monkeypatch) -> None:
    """What several take together is nobody's; one after the other they are timed, and only one of them is slow."""
    filler, walks = MaskFiller(), [Walk(number) for number in range(3)]
    masks, slow = np.zeros((3, VOCABULARY.words), dtype=np.int32), walks[1].matcher
    clock = iter(range(10**6))
    monkeypatch.setattr(batch.time, "thread_time", lambda: next(clock) * 1e-3)  # a millisecond each time that it is read
    monkeypatch.setattr(batch, "SLOW_S", 0.0005)
    monkeypatch.setattr(matcher, "PATIENCE_S_A_TOKEN", 0.02)
    monkeypatch.setattr(matcher, "PATIENCE_S", 0.0)
    monkeypatch.setattr(slow, "finish", lambda masks, row, seconds: Matcher.finish(slow, masks, row, 100 * seconds))
    for _ in range(4):
        filler.fill([walk.matcher for walk in walks], [(walk.tokens, len(PROMPT)) for walk in walks], masks)
    assert [walk.matcher.failure is not None for walk in walks] == [False, True, False]
    assert "takes too long to follow" in slow.failure and not masks[1].any() and masks[[0, 2]].any(axis=1).all()


def test_who_is_slow_is_found_among_others(monkeypatch) -> None:
    """Within a word a mask takes 7 ms, in JSON 5 us."""
    vocabulary = Vocabulary(made_up(128_000), 128_000, [0])
    slow, quick = (Compiled.of(spec, vocabulary) for spec in (WORDS, of_json_object("x")))
    monkeypatch.setattr(batch, "SLOW_S", 1e-3)
    monkeypatch.setattr(matcher, "SLOW_S", 1e-3)
    masks = np.zeros((4, vocabulary.words), dtype=np.int32)
    matchers = [one.matcher(frozenset([0])) for one in (quick, quick, slow, quick)]
    assert not slow.slow
    filler, expected = MaskFiller(), masks.copy()
    outputs = [([ord("a" if one.compiled is slow else "{") + 1], 0) for one in matchers]  # see made_up
    for row, one in enumerate(matchers):
        one.follow(*outputs[row])
        one.native.fill_next_token_bitmask(expected, row, False)
    for _ in range(2):
        filler.fill(matchers, outputs, masks)
        assert (masks == expected).all()
    assert slow.slow and not quick.slow


def test_who_is_slow_waits_alone(monkeypatch) -> None:
    filler, walks = MaskFiller(), [Walk(number) for number in range(4)]
    masks, gate = np.zeros((6, VOCABULARY.words), dtype=np.int32), threading.Event()
    matchers, outputs, rows = [walk.matcher for walk in walks], [(walk.tokens, len(PROMPT)) for walk in walks], [5, 3, 0, 1]
    monkeypatch.setattr(matchers[2], "compiled", compiled(SPECS[2]))
    matchers[2].compiled.slow = True
    monkeypatch.setattr(beside, "_filled", lambda *args, inner=beside._filled: gate.wait(60) and inner(*args))
    for _ in range(2):
        filler.fill(matchers, outputs, masks, rows)
        assert [one.missed for one in matchers] == [False, False, True, False] and matchers[2].busy and not masks[0].any()
        assert all((masks[row] == walk.mask()).all() for row, walk in zip(rows, walks, strict=True) if row)
    gate.set()
    matchers[2].coming.result(60)
    filler.fill(matchers, outputs, masks, rows)
    assert all((masks[row] == walk.mask()).all() for row, walk in zip(rows, walks, strict=True)) and masks[0].any()
    assert not any(one.busy for one in matchers)


@pytest.mark.parametrize("share_s", [1e-9, 1e9], ids=["threads", "alone"])
def test_native_code_that_raises_ends_one_sequence_alone(share_s, monkeypatch) -> None:
    """It does for a text that has ended, which the engine never asks about."""
    monkeypatch.setattr(batch, "_SHARE_S", share_s)
    filler, walks = MaskFiller(), [Walk(len(GRAMMARS) * number) for number in range(6)]  # JSON
    masks = np.zeros((6, VOCABULARY.words), dtype=np.int32)
    ended = walks[4].matcher
    for token in (ord("{"), ord("}"), STOP):
        assert ended.native.accept_token(token, False)
    for _ in range(3):
        filler.fill([walk.matcher for walk in walks], [(walk.tokens, len(PROMPT)) for walk in walks], masks)
        for row in (0, 1, 2, 3, 5):
            assert (masks[row] == (mask := walks[row].mask())).all() and mask.any()
            walks[row].go_on(mask)
    assert [walk.matcher.failure is not None for walk in walks] == [False] * 4 + [True, False]
    assert "cannot be followed: RuntimeError" in ended.failure and not masks[4].any()
