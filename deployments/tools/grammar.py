"""Grammars of calls: for those that must be made, and for strict arguments of those that a model makes on its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from model_core.errors import RequestError
from model_core.grammar.spec import Call, GrammarSpec, of_schema, of_tools

PARAM = "tools"
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
ANY_ARGUMENTS: dict[str, Any] = {"type": "object"}


class Callable(Protocol):
    """A function as protocol/tools.py reads it: parameters is a JSON schema, None: it has none."""

    @property
    def name(self) -> str: ...
    @property
    def parameters(self) -> dict[str, Any] | None: ...
    @property
    def strict(self) -> bool | None: ...


@dataclass(frozen=True)
class Form:
    """Calls as text: begin, then one or more of `open {"name": ..., key: {...}} close` with `between` in between, then end.

    trigger: a beginning of that after which, in free text, a call must follow. key: of the arguments.
    """

    key: str = "arguments"
    open: str = ""
    close: str = ""
    begin: str = ""
    between: str = ""
    end: str = ""
    trigger: str = ""

    def forced(self, functions: Iterable[Callable], *, several: bool) -> GrammarSpec:
        """Nothing but calls, or the only one. Raises RequestError for a strict schema that cannot be enforced."""
        calls = [Call(self._head(function, ""), _schema(function), "}" + self.close) for function in functions]
        return of_tools(calls, PARAM, begin=self.begin, between=self.between if several else None, end=self.end, several=False)

    def free(self, functions: Iterable[Callable], *, several: bool) -> GrammarSpec:
        """Any text, with calls in it or none, but none that is not as it should be. Raises RequestError as `forced`."""
        calls = [Call(self._head(function, self.trigger), _schema(function), "}" + self.close) for function in functions]
        return of_tools(calls, PARAM, begin=self.trigger, between=self.between if several and self.end else None, end=self.end,
                        several=several and not self.end, free_text=True)  # fmt: skip

    def _head(self, function: Callable, after: str) -> str:
        """What stands before the arguments: without `begin`, or in free text all that stands after the trigger."""
        head = f'{self.open}{{"name": "{function.name}", "{self.key}": '
        return head if not after else (self.begin + head).removeprefix(after)


ARRAY = Form(begin="[", between=", ", end="]")


def check(function: Callable, param: str) -> None:
    """Raises RequestError for a strict function whose schema cannot be enforced, with the path. param: the field it is in."""
    if function.strict:
        _enforceable(function, param)


def _schema(function: Callable) -> dict[str, Any]:
    """Arguments that need not be strict may have a schema that cannot be enforced: then they are any object."""
    try:
        return _enforceable(function, PARAM)
    except RequestError:
        if function.strict:
            raise
        return ANY_ARGUMENTS


def _enforceable(function: Callable, param: str) -> dict[str, Any]:
    """A schema of objects alone. Raises RequestError."""
    if function.parameters is None:
        return NO_ARGUMENTS
    schema = {"type": "object", **function.parameters}  # beside a keyword that may say otherwise it is refused
    if schema["type"] != "object":
        raise RequestError(f"Invalid schema for '{param}': parameters must have type 'object'", param=param,
                           code="invalid_json_schema")  # fmt: skip
    of_schema(schema, param)
    return schema
