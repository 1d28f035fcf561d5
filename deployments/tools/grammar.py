"""Grammars of calls: for those that must be made, for strict arguments of those that a model makes on its own, and for answers
of another form that a model may give in place of calls."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from model_core.errors import RequestError
from model_core.grammar.calls import (
    Block,
    Call,
    Control,
    of_answer_or_calls,
    of_calls,
    of_object_apart,
    of_text_or_calls,
    of_text_with_calls,
)
from model_core.grammar.ebnf import Rules
from model_core.grammar.schema import keywords_grammar
from model_core.grammar.spec import GrammarSpec, of_json_object, of_schema

PARAM = "tools"
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
ANY_ARGUMENTS: dict[str, Any] = {"type": "object"}


class Callable(Protocol):
    """A function as protocol/tools.py reads it: parameters is a JSON schema, None or {}: it has none."""

    @property
    def name(self) -> str: ...
    @property
    def parameters(self) -> dict[str, Any] | None: ...
    @property
    def strict(self) -> bool | None: ...


@dataclass(frozen=True)
class Form:
    """Calls as text: begin, then one or more of head (with the name for %s), arguments and tail, `between` in between, then
    end.

    keywords: arguments are written by name, a=1, b="x", and not as a JSON object.
    trigger: a beginning of all that, after which, in free text, a call must follow. Without it calls are the whole answer, and
    a text that is none of them does not begin with a character of `never`.
    control, below: the control tokens of the model, which a grammar makes it write where they are in these texts.
    """

    head: str
    tail: str
    begin: str = ""
    between: str = ""
    end: str = ""
    trigger: str = ""
    never: str = ""
    keywords: bool = False

    def forced(self, functions: Iterable[Callable], *, several: bool, control: tuple[Control, ...] = ()) -> GrammarSpec:
        """Nothing but calls, or the only one. Raises RequestError for a strict schema that cannot be enforced."""
        return of_calls(self._block(functions, several, control), PARAM)

    def free(self, functions: Iterable[Callable], *, several: bool, control: tuple[Control, ...] = ()) -> GrammarSpec:
        """Any text, with calls in it or none, but none that is not as it should be. Raises RequestError as `forced`."""
        if not self.trigger:
            return of_text_or_calls(self._block(functions, several, control), PARAM, self.never)
        block = self._block(functions, several and bool(self.end), control)
        return of_text_with_calls(block, PARAM, self.trigger, several=several and not self.end)

    def beside(
        self, answer: GrammarSpec, functions: Iterable[Callable], *, several: bool, control: tuple[Control, ...] = ()
    ) -> GrammarSpec:
        """Nothing but calls, or an answer of another form. Raises RequestError as `forced`; where one could be taken for the
        other, that is found when it is compiled."""
        if (self.begin + self.head).startswith("{") and answer.text == of_json_object(PARAM).text:
            answer = of_object_apart("name", answer.param)
        return of_answer_or_calls(answer, self._block(functions, several, control), PARAM)

    def beginnings(self, names: Iterable[str]) -> tuple[str, ...]:
        """How calls of these functions begin."""
        return tuple(self.begin + self._head(name) for name in names)

    def _block(self, functions: Iterable[Callable], several: bool, control: tuple[Control, ...]) -> Block:
        calls = [Call(self._head(one.name), _schema(one, self.keywords), self.tail, self.keywords) for one in functions]
        return Block(tuple(calls), self.begin, self.between if several else None, self.end, control)

    def _head(self, name: str) -> str:
        """What stands before the arguments."""
        if self.keywords and not _WORD.fullmatch(name):
            raise RequestError(f"this model's form of calls cannot name the function '{name}': begin with a letter or '_'",
                               param=PARAM, code="invalid_value")  # fmt: skip
        return self.head % name


def check(function: Callable, param: str) -> None:
    """Raises RequestError for a strict function whose schema cannot be enforced, with the path. param: the field it is in."""
    if function.strict:
        _enforceable(function, param)


def _schema(function: Callable, keywords: bool) -> dict[str, Any]:
    """Arguments that need not be strict may have a schema that cannot be enforced: then they are any object, or, by name, those
    that it names with any values."""
    try:
        schema = _enforceable(function, PARAM)
        if keywords:
            keywords_grammar(schema, PARAM, Rules())
        return schema
    except RequestError:
        if function.strict:
            raise
        if not keywords:
            return ANY_ARGUMENTS
    named = (function.parameters or {}).get("properties")
    words = [name for name in named if _WORD.fullmatch(name)] if isinstance(named, dict) else []
    return {"type": "object", "properties": dict.fromkeys(words, True)}


def _enforceable(function: Callable, param: str) -> dict[str, Any]:
    """A schema of objects alone. Raises RequestError."""
    if not function.parameters:
        return NO_ARGUMENTS
    schema = {"type": "object", **function.parameters}  # beside a keyword that may say otherwise it is refused
    if schema["type"] != "object":
        raise RequestError(f"Invalid schema for '{param}': parameters must have type 'object'", param=param,
                           code="invalid_json_schema")  # fmt: skip
    of_schema(schema, param)
    return schema
