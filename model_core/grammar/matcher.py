"""Which tokens may come next: compiled grammars, and one matcher per sequence that follows its tokens.

A mask is a row of bits, one per token id, lowest bit of the first word first: int32 [ceil(vocab_size / 32)].
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from concurrent.futures import Future
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from model_core.errors import RequestError
from model_core.grammar.ebnf import GROUP, MARKS
from model_core.grammar.native import native
from model_core.grammar.pattern import INVALID
from model_core.grammar.spec import Apart, GrammarSpec

PATIENCE_S, PATIENCE_S_A_TOKEN = 1.0, 0.02  # of an engine, whose threads do nothing else meanwhile
SLOW_S = 2e-3  # for which all sequences would wait; a mask of most grammars takes 5 to 50 us


class Vocabulary:
    """The tokens that grammars are made of.

    tokens: bytes by id, b"" for what never stands in a text: special tokens, ids without a token. size: ids of the model, of
    which those behind the tokenizer's are never allowed. eos_ids end a text unless a matcher is told others.
    """

    def __init__(self, tokens: Sequence[bytes], size: int, eos_ids: Sequence[int]) -> None:
        self.tokens, self.size, self.eos_ids = list(tokens[:size]), size, tuple(eos_ids)
        for token in eos_ids:  # even if the tokenizer takes it for a word
            self.tokens[token : token + 1] = [b""]
        self.info = native.TokenizerInfo(self.tokens, 0, size, list(eos_ids), False)  # 0: tokens are raw bytes
        self._marked: dict[tuple[int, ...], Vocabulary] = {}  # as many as models have sets of tags: one

    def marked(self, marks: tuple[int, ...]) -> Vocabulary:
        """The same with these control tokens as the characters that stand for them in a grammar."""
        if not marks:
            return self
        if marks not in self._marked:
            tokens = list(self.tokens)
            for token, mark in zip(marks, MARKS, strict=False):
                tokens[token] = mark.encode()
            self._marked = {marks: Vocabulary(tokens, self.size, self.eos_ids)}
        return self._marked[marks]

    @property
    def words(self) -> int:
        """Length of a mask."""
        return -(-self.size // 32)


class Packed(NamedTuple):
    """A compiled grammar on its way to another process."""

    text: str
    slow: bool


class Compiled:
    """A grammar for a vocabulary. Shared, and nothing in it changes but `slow`: whether some of its masks take longer than
    SLOW_S, or may, so that they are filled beside the engine's thread (beside.py). What it allows does not depend on that."""

    def __init__(self, grammar: Any, vocabulary: Vocabulary, slow: bool = False) -> None:
        self.grammar, self.vocabulary, self.slow = grammar, vocabulary, slow
        self.nbytes: int = grammar.memory_size_bytes()

    @classmethod
    def of(cls, spec: GrammarSpec, vocabulary: Vocabulary, threads: int = 1) -> Compiled:
        """Compiles here and now, however long it takes (see compiler.py). Raises RequestError for what is no grammar."""
        if spec.apart is not None:
            _check_apart(spec.apart, spec.param)
        vocabulary = vocabulary.marked(spec.marks)
        compiler = native.GrammarCompiler(vocabulary.info, threads, False, -1)  # without a cache of its own
        try:
            return cls(compiler.compile_grammar_from_strings(spec.text, "root"), vocabulary, _counts(spec.text))
        except Exception as error:  # the binding raises RuntimeError and others, with the place in the text
            reason = str(error).strip().split("] ", 1)[-1].split(": ", 1)[-1]
            raise RequestError(f"Invalid '{spec.param}': {reason}", param=spec.param, code=INVALID) from None

    def matcher(self, stop_ids: frozenset[int]) -> Matcher:
        """For a new sequence; its own."""
        return Matcher(self, stop_ids)

    def packed(self) -> Packed:
        return Packed(str(self.grammar.serialize_json()), self.slow)

    @classmethod
    def unpacked(cls, packed: Packed, vocabulary: Vocabulary) -> Compiled:
        """What `packed` gave in a process with the same vocabulary, marked in the same way."""
        return cls(native.CompiledGrammar.deserialize_json(packed.text, vocabulary.info), vocabulary, packed.slow)


class Matcher:
    """What may follow the tokens of one sequence. stop_ids: allowed where the text may end, and nowhere else.

    failure: why nothing can follow any more; None while all is well. `finish` is for batch.py, which lets `native` of many fill
    masks at a time; the rest is for beside.py. coming: the mask of the next token, begun there. missed: it did not come before
    that token was sampled, so there is none until the scheduler has heard of it (Scheduler.commit).
    """

    def __init__(self, compiled: Compiled, stop_ids: frozenset[int]) -> None:
        self.compiled = compiled
        self.native = native.GrammarMatcher(compiled.grammar, sorted(stop_ids), False, -1, None)
        words = compiled.vocabulary.tokens
        self._words = [stop for stop in stop_ids if stop < len(words) and words[stop]]  # that may be part of the text, too
        self._read = self._fills = 0
        self._spent = 0.0
        self.failure: str | None = None
        self.coming: Future[tuple[np.ndarray, float]] | None = None
        self.missed = False

    @property
    def busy(self) -> bool:
        """Whether no token can be sampled now, since its mask is being filled beside."""
        return self.missed or (self.coming is not None and not self.coming.done())

    def follow(self, tokens: Sequence[int], start: int = 0) -> None:
        """Read what it has not read yet of the output, which is tokens[start:]. A token that was not allowed is a failure."""
        while start + self._read < len(tokens) and self.failure is None:
            token = tokens[start + self._read]
            try:
                accepted = self.native.accept_token(token, False)
            except Exception as error:
                self._give_up(error)
                return
            if accepted:
                self._read += 1
            else:
                self.failure = f"token {token} at place {self._read} of the output does not follow the grammar"

    def fill(self, masks: np.ndarray, row: int) -> None:
        """Write the mask of the next token into a row of int32 [rows, words]; after a failure nothing is allowed."""
        if self.failure is None:
            began = time.thread_time()
            try:
                self.native.fill_next_token_bitmask(masks, row, False)
            except Exception as error:
                self._give_up(error)
            else:
                seconds = time.thread_time() - began
                self.compiled.slow |= seconds > SLOW_S
                self.finish(masks, row, seconds)
                return
        masks[row] = 0

    def take(self, masks: np.ndarray, row: int) -> None:
        """Write the mask that was coming, if it is there; else, and after a failure, nothing is allowed."""
        masks[row] = 0
        if self.coming is None:
            return
        self.missed = not self.coming.done()
        if not self.missed:
            coming, self.coming = self.coming, None
            try:
                masks[row], seconds = coming.result()
            except Exception as error:
                self._give_up(error)
            else:
                self.finish(masks, row, seconds)

    def _give_up(self, error: Exception) -> None:
        """Native code raised: this sequence ends, others go on."""
        self.failure = f"its grammar cannot be followed: {type(error).__name__}: {error}"

    def finish(self, masks: np.ndarray, row: int, seconds: float) -> None:
        """`native` has written the row, and its thread has run so long for it, without what others had of the core or the
        interpreter."""
        self._spent += seconds
        self._fills += 1
        if self._spent > PATIENCE_S + self._fills * PATIENCE_S_A_TOKEN:  # the walks of worker.py did not come here
            self.failure = f"its grammar takes too long to follow: {1e3 * self._spent / self._fills:.0f} ms a token"
        if self._words and not self.native.is_completed():
            for stop in self._words:
                masks[row, stop >> 5] &= _ALL_BUT[stop & 31]


def _counts(text: str) -> bool:
    """Whether a grammar counts so far, by numbers or by rules (ebnf.repeated, chained), that walks (worker.py) may not come to
    the end of it, where it is slow."""
    return _FAR.search(text) is not None or len(_LINK.findall(text)) > GROUP


def _check_apart(apart: Apart, param: str) -> None:
    """Raises RequestError for answers that could begin like what they must be told from."""
    alone = Compiled.of(GrammarSpec(apart.text, param), _bytes())
    for beginning in apart.beginnings:
        matcher = alone.matcher(frozenset([256]))
        matcher.follow(list(beginning.encode()))
        if matcher.failure is None:
            words = f"'{param}' allows answers that begin as this model's calls of tools do ({beginning})"
            raise RequestError(f"{words}, and nobody could tell them apart: allow less, or leave 'tools' out.", param=param,
                               code="unsupported_parameter")  # fmt: skip


@cache
def _bytes() -> Vocabulary:
    """A token per byte, and one that ends a text."""
    return Vocabulary([*(bytes([i]) for i in range(256)), b""], 257, [256])


_FAR, _LINK = re.compile(r"\{\s*(\d*\s*,\s*)?\d{3}"), re.compile(r"(?m)^\w+ ::= \[.*\] \w+( \| \"\")?$")
_ALL_BUT = [np.array(0xFFFFFFFF ^ (1 << bit), dtype=np.uint32).view(np.int32)[()] for bit in range(32)]
