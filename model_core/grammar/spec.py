"""What an answer must look like, as plain data that travels with a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from model_core.errors import RequestError
from model_core.grammar.ebnf import Rules, either, literal
from model_core.grammar.pattern import INVALID, pattern_grammar
from model_core.grammar.schema import schema_grammar

BUSY = "grammar_compiler_busy"  # the code of a request that is refused for the grammars of others
MAX_TEXT = 262_144  # characters of a grammar, also of one made from a schema or an expression
MAX_CHOICES = 1024


class Apart(NamedTuple):
    """An answer in place of something else, from which it must be told by its beginning. text: a grammar of answers alone.
    beginnings: texts with which none of them may begin."""

    text: str
    beginnings: tuple[str, ...]


@dataclass(frozen=True)
class GrammarSpec:
    """text: a grammar in llama.cpp's notation (GBNF) as xgrammar reads it, from rule `root`. param: the request's field that
    it came from, for errors. marks: ids of control tokens, for which the first of ebnf.MARKS stand in the text. apart: what is
    checked when it is compiled. Those with equal text and marks share a compiled grammar."""

    text: str
    param: str
    marks: tuple[int, ...] = ()
    apart: Apart | None = None


def of_schema(schema: Any, param: str) -> GrammarSpec:
    """Raises RequestError, with the path, for a keyword that could not be enforced or a schema that is none."""
    rules = Rules()
    return bounded(rules.text(schema_grammar(schema, param, rules)), param)


def of_json_object(param: str) -> GrammarSpec:
    """Any JSON object."""
    return of_schema({"type": "object"}, param)


def of_regex(pattern: str, param: str) -> GrammarSpec:
    """A text that matches from its first to its last character. Raises RequestError for what could not be enforced:
    look-around, back references, anchors inside."""
    if not pattern:
        raise RequestError(f"{param} is empty", param=param, code=INVALID)
    rules = Rules()
    return bounded(rules.text(pattern_grammar(pattern, param, rules)), param)


def of_choice(choices: Sequence[str], param: str) -> GrammarSpec:
    """One of these texts."""
    if not 1 <= len(choices) <= MAX_CHOICES or not all(choices):
        raise RequestError(f"{param} must hold 1 to {MAX_CHOICES} texts, none of them empty", param=param, code=INVALID)
    return bounded(Rules().text(either(_literal(choice, param) for choice in choices)), param)


def of_ebnf(grammar: str, param: str) -> GrammarSpec:
    """A grammar of the client's own; what is wrong in it is found when it is compiled."""
    if not grammar.strip():
        raise RequestError(f"{param} is empty", param=param, code=INVALID)
    return bounded(grammar, param)


def _literal(text: str, param: str) -> str:
    try:
        return literal(text)
    except ValueError:
        words = f"{param} holds half a surrogate pair, or one of the last four code points"
        raise RequestError(words, param=param, code=INVALID) from None


def bounded(text: str, param: str, marks: tuple[int, ...] = (), apart: Apart | None = None) -> GrammarSpec:
    """Raises RequestError for a grammar that is too long."""
    if len(text) > MAX_TEXT:
        raise RequestError(f"{param} makes a grammar of {len(text)} characters, at most {MAX_TEXT} are possible",
                           param=param, code=INVALID)  # fmt: skip
    return GrammarSpec(text, param, marks, apart)
