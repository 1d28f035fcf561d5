"""Which tokens may come next: compiled grammars, and one matcher per sequence that follows its tokens.

A mask is a row of bits, one per token id, lowest bit of the first word first: int32 [ceil(vocab_size / 32)].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from model_core.errors import RequestError
from model_core.grammar.native import native
from model_core.grammar.pattern import INVALID
from model_core.grammar.spec import GrammarSpec


class Vocabulary:
    """The tokens that grammars are made of.

    tokens: bytes by id, b"" for what never stands in a text: special tokens, ids without a token. size: ids of the model, of
    which those behind the tokenizer's are never allowed. eos_ids end a text unless a matcher is told others.
    """

    def __init__(self, tokens: Sequence[bytes], size: int, eos_ids: Sequence[int]) -> None:
        self.tokens, self.size, self.eos_ids = list(tokens[:size]), size, tuple(eos_ids)
        self.info = native.TokenizerInfo(self.tokens, 0, size, list(eos_ids), False)  # 0: tokens are raw bytes

    @property
    def words(self) -> int:
        """Length of a mask."""
        return -(-self.size // 32)


class Compiled:
    """A grammar for a vocabulary. Shared: nothing in it changes."""

    def __init__(self, grammar: Any, vocabulary: Vocabulary) -> None:
        self.grammar, self.vocabulary = grammar, vocabulary
        self.nbytes: int = grammar.memory_size_bytes()

    @classmethod
    def of(cls, spec: GrammarSpec, vocabulary: Vocabulary) -> Compiled:
        """Compiles here and now, however long it takes. Raises RequestError for what is no grammar."""
        compiler = native.GrammarCompiler(vocabulary.info, 1, False, -1)  # one thread, no cache
        try:
            return cls(compiler.compile_grammar_from_strings(spec.text, "root"), vocabulary)
        except Exception as error:  # the binding raises RuntimeError and others, with the place in the text
            reason = str(error).strip().split("] ", 1)[-1].split(": ", 1)[-1]
            raise RequestError(f"Invalid '{spec.param}': {reason}", param=spec.param, code=INVALID) from None


class Matcher:
    """What may follow the tokens of one sequence. stop_ids: allowed where the text may end, and nowhere else."""

    def __init__(self, compiled: Compiled, stop_ids: frozenset[int]) -> None:
        self._stops = sorted(stop_ids)
        self.native = native.GrammarMatcher(compiled.grammar, self._stops, False, -1, None)
        self.accepted = 0

    def follow(self, output: Sequence[int]) -> None:
        """Read the tokens of the whole output that it has not read yet. Raises ValueError for one that was not allowed."""
        for token in output[self.accepted :]:
            if not self.native.accept_token(token, False):
                raise ValueError(f"token {token} at place {self.accepted} of the output does not follow the grammar")
            self.accepted += 1

    def fill(self, mask: np.ndarray) -> None:
        """Write the mask of the next token. int32 [words], contiguous."""
        self.native.fill_next_token_bitmask(mask[None], 0, False)
        if not self.native.is_completed():
            for stop in self._stops:  # an ordinary token that the client wants to stop at may also be part of the text
                mask[stop >> 5] &= ~np.int32(1 << (stop & 31)) if stop & 31 < 31 else np.int32(0x7FFFFFFF)
