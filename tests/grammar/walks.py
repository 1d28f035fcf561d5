"""A small vocabulary, and texts that a model of no sense at all would write under a grammar."""

from __future__ import annotations

import random
from itertools import takewhile

import numpy as np

from model_core.grammar.matcher import Compiled, Matcher, Vocabulary
from model_core.grammar.spec import GrammarSpec

_WORDS = ['{"', '"}', '": ', '", "', '",', '"]', "]}", "}}", "null", "true", "10", "-1", "12.5", ".5", "e1", "ab", "abc",
          "aaaa", "é€", "\n\n", '\\"', '\\n"', 'x" y', ", ", "[[", "<tool", "_call>", "😀"]  # fmt: skip
_PIECES = [bytes([i]) for i in range(256)] + [word.encode() for word in _WORDS] + ["€".encode()[:2], b"a\xe2", b"\x82\xac"]
STOP, SPECIAL = len(_PIECES), len(_PIECES) + 1
OTHER = SPECIAL + 1
VOCABULARY = Vocabulary([*_PIECES, b"", b"", b""], OTHER + 3, [STOP])  # two ids that the tokenizer does not know


def compiled(spec: GrammarSpec) -> Compiled:
    return Compiled.of(spec, VOCABULARY)


def allowed(matcher: Matcher) -> list[int]:
    """Ids that may come next."""
    masks = np.zeros((2, VOCABULARY.words), dtype=np.int32)
    matcher.fill(masks, 1)
    return np.flatnonzero(np.unpackbits(masks[1].view(np.uint8), bitorder="little")[: VOCABULARY.size]).tolist()


def write(
    grammar: Compiled, seed: int, most: int = 500, *, begin: str = "", shown: dict[int, str] | None = None
) -> tuple[bytes, bool]:
    """What random choices write behind a beginning, and whether it came to an end by itself. They like to close what is open,
    and control tokens, which may be written only if they have texts (shown)."""
    shown = shown or {}
    chance, matcher, output = random.Random(seed), Matcher(grammar, frozenset([STOP])), list(begin.encode())
    matcher.follow(output)
    for step in range(most):
        ids = allowed(matcher)
        assert ids, f"nothing may follow {text(output)!r}"
        assert all(i <= STOP or i in shown for i in ids), "an id that stands for no text"
        eager = 1 + step / 20
        weights = [8 * eager if i >= STOP or VOCABULARY.tokens[i][:1] in (b'"', b"}", b"]") else 1.0 if i > 255 else
                   0.5 if i < 128 else 0.02 for i in ids]  # fmt: skip
        token = chance.choices(ids, weights)[0]
        if token == STOP:
            return text(output, shown), True
        output.append(token)
        matcher.follow(output)
        assert matcher.failure is None, "the mask had allowed too much"
    return text(output, shown), False


def accepts(grammar: Compiled, *whole: str | int) -> bool:
    """Whether texts (byte by byte) and control tokens (by id) are together of the grammar, and not only a beginning."""
    matcher = Matcher(grammar, frozenset([STOP]))
    matcher.follow([token for part in whole for token in (part.encode() if isinstance(part, str) else [part])])
    return matcher.failure is None and STOP in allowed(matcher)


def text(output: list[int], shown: dict[int, str] | None = None) -> bytes:
    """shown: texts of control tokens."""
    return b"".join(shown[i].encode() if shown and i in shown else VOCABULARY.tokens[i] for i in output)


def by_bytes(grammar: Compiled, output: list[int]) -> set[int]:
    """What `allowed` should say, but for the stop token: tokens whose bytes can follow one by one, which asks no mask."""
    matcher = Matcher(grammar, frozenset([STOP]))
    matcher.follow(output)
    found, inner = set(), matcher.native
    for token, word in enumerate(VOCABULARY.tokens):
        taken = sum(1 for _ in takewhile(lambda byte: inner.accept_token(byte, False), word))
        if taken:
            inner.rollback(taken)
        if word and taken == len(word):
            found.add(token)
    return found
