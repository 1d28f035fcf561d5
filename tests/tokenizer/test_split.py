"""Special tokens in text."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from model_core.tokenizer.split import AddedToken, Splitter

words = st.lists(st.text("ab<|", min_size=1, max_size=5), min_size=1, max_size=8, unique=True)


@given(words, st.text("ab<| ", max_size=40))
def test_longest_token_at_the_leftmost_place(words: list[str], text: str) -> None:
    splitter = Splitter(AddedToken(word, i) for i, word in enumerate(words))
    longest_first = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    expected = [part for part in re.split(f"({longest_first})", text) if part]
    pieces = list(splitter.split(text))
    assert [piece for piece, _, _ in pieces] == expected
    assert all((token is None) == (piece not in words) for piece, token, _ in pieces)
    assert all(text[start : start + len(piece)] == piece for piece, _, start in pieces)
    assert splitter.starts(text) == [i for i in range(len(text)) if any(text.startswith(w, i) for w in words)]


@given(words, st.text("ab<|", max_size=12))
def test_ends_inside(words: list[str], text: str) -> None:
    splitter = Splitter(AddedToken(word, i) for i, word in enumerate(words))
    expected = any(text.endswith(word[:n]) for word in words for n in range(1, len(word)))
    assert splitter.ends_inside(text) == splitter.ends_inside(text + " \n") == expected


def test_no_tokens() -> None:
    assert list(Splitter([]).split("abc")) == [("abc", None, 0)]
    assert not Splitter([]).touches("abc") and Splitter([]).starts("abc") == []
