"""What an answer must look like, as plain data that travels with a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from model_core.errors import RequestError
from model_core.grammar.ebnf import NOTHING, Rules, either, literal
from model_core.grammar.pattern import INVALID, pattern_grammar
from model_core.grammar.schema import schema_grammar

MAX_TEXT = 262_144  # characters of a grammar, also of one made from a schema or an expression
MAX_CHOICES = 1024


@dataclass(frozen=True)
class GrammarSpec:
    """text: a grammar in llama.cpp's notation (GBNF) as xgrammar reads it, from rule `root`. param: the request's field that
    it came from, for errors. Equal specs share a compiled grammar."""

    text: str
    param: str


class Call(NamedTuple):
    """A call of one tool, as the model writes it: prefix, its arguments as JSON, suffix."""

    prefix: str
    schema: Any
    suffix: str


def of_schema(schema: Any, param: str) -> GrammarSpec:
    """Raises RequestError, with the path, for a keyword that could not be enforced or a schema that is none."""
    rules = Rules()
    return _bounded(rules.text(schema_grammar(schema, param, rules)), param)


def of_json_object(param: str) -> GrammarSpec:
    """Any JSON object."""
    return of_schema({"type": "object"}, param)


def of_regex(pattern: str, param: str) -> GrammarSpec:
    """A text that matches from its first to its last character. Raises RequestError for what could not be enforced:
    look-around, back references, anchors inside."""
    if not pattern:
        raise RequestError(f"{param} is empty", param=param, code=INVALID)
    return _bounded(Rules().text(pattern_grammar(pattern, param)), param)


def of_choice(choices: Sequence[str], param: str) -> GrammarSpec:
    """One of these texts."""
    if not 1 <= len(choices) <= MAX_CHOICES or not all(choices):
        raise RequestError(f"{param} must hold 1 to {MAX_CHOICES} texts, none of them empty", param=param, code=INVALID)
    return _bounded(Rules().text(either(_literal(choice, param) for choice in choices)), param)


def of_ebnf(grammar: str, param: str) -> GrammarSpec:
    """A grammar of the client's own; what is wrong in it is found when it is compiled."""
    if not grammar.strip():
        raise RequestError(f"{param} is empty", param=param, code=INVALID)
    return _bounded(grammar, param)


def of_tools(calls: Sequence[Call], param: str, *, begin: str = "", between: str | None = None, end: str = "",
             free_text: bool = False, several: bool = True) -> GrammarSpec:  # fmt: skip
    """Calls of tools, each `call.prefix` + arguments valid for `call.schema` + `call.suffix`, in blocks begin ... end.

    between: what stands between two calls of one block; None: one call a block. several: more than one block (without
    free_text: one right behind the other, so begin should bring its own line break if the model writes one).
    free_text: any text, or none, may stand before and between the blocks, and there may be no block at all: it becomes a call
    as soon as `begin` was written, which then must not be empty; after the only block (several=False) the answer ends.
    The answer ends by a stop token where this is complete. Raises RequestError like of_schema.

    Hermes: Call('{"name": "f", "arguments": ', schema, "}"), begin="<tool_call>\\n", end="\\n</tool_call>".
    Llama 3: Call('{"name": "f", "parameters": ', schema, "}"), several=False.
    Mistral: Call as Hermes, begin="[TOOL_CALLS][", between=", ", end="]", several=False.
    The texts are matched by ordinary tokens: one that is a special token of the tokenizer never matches.
    """
    rules = Rules()
    made = [f"{_literal(call.prefix, param)} {schema_grammar(call.schema, param, rules)} {_literal(call.suffix, param)}"
            for call in calls]  # fmt: skip
    if not made:
        raise ValueError("no tool to call")
    call = rules.add(either(made))
    inside = call if between is None else f"{call} ({_literal(between, param)} {call})*"
    if free_text:
        body = rules.add(" ".join(part for part in (inside, _literal(end, param)) if part != NOTHING))
        root = f"TagDispatch(({_literal(begin, param)}, {body}), loop_after_dispatch={str(several).lower()})"
        return _bounded(rules.text(root), param)
    block = rules.add(" ".join(part for part in (_literal(begin, param), inside, _literal(end, param)) if part != NOTHING))
    return _bounded(rules.text(f"{block}+" if several else block), param)


def _literal(text: str, param: str) -> str:
    try:
        return literal(text)
    except UnicodeEncodeError:
        raise RequestError(f"{param} holds half a surrogate pair", param=param, code=INVALID) from None


def _bounded(text: str, param: str) -> GrammarSpec:
    if len(text) > MAX_TEXT:
        raise RequestError(f"{param} makes a grammar of {len(text)} characters, at most {MAX_TEXT} are possible",
                           param=param, code=INVALID)  # fmt: skip
    return GrammarSpec(text, param)
