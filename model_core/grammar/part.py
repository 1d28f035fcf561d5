"""A part of a JSON schema: a node, and the path that leads to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from model_core.errors import RequestError

INVALID = "invalid_json_schema"
TYPES = ("string", "integer", "number", "boolean", "null", "array", "object")


@dataclass(frozen=True)
class Part:
    """node: as the client wrote it. path: a JSON pointer to it, from "#". param: the request's field that the schema came from.

    What it says of types and counts is read from a node that is a dict."""

    node: Any
    path: str
    param: str

    def child(self, node: Any, *keys: str | int) -> Part:
        """A node that stands behind these keys."""
        return Part(node, self._pointer(keys), self.param)

    def where(self, *keys: str | int) -> str:
        """How errors about what stands there begin."""
        return f"Invalid schema for '{self.param}': at '{self._pointer(keys)}'"

    def refuse(self, what: str, *keys: str | int) -> NoReturn:
        """Raises RequestError: what stands behind these keys cannot be enforced."""
        raise RequestError(f"{self.where(*keys)}: {what} cannot be enforced", param=self.param, code=INVALID)

    def types(self) -> tuple[str, ...]:
        """The value of "type" as a list; all of TYPES without one. Raises RequestError."""
        given = self.node.get("type", TYPES)
        types = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, (list, tuple)) else ()
        if not types or not all(one in TYPES for one in types):
            self.refuse(f"{given!r}, not one of {', '.join(TYPES)},", "type")
        return types

    def counts(self, least: str, most: str, limit: int) -> tuple[int, int | None]:
        """The values of two keywords, 0 and None without them. Raises RequestError unless 0 <= least <= most <= limit."""
        found: list[int | None] = []
        for key in (least, most):
            value = self.node.get(key)
            if type(value) is float and value.is_integer():
                value = int(value)
            if value is not None and (type(value) is not int or not 0 <= value <= limit):
                self.refuse(f"{key!r} that is no integer from 0 to {limit}", key)
            found.append(value)
        low, high = found
        if high is not None and high < (low or 0):
            self.refuse("a maximum below the minimum", most)
        return low or 0, high

    def _pointer(self, keys: tuple[str | int, ...]) -> str:
        return "/".join([self.path, *(str(key).replace("~", "~0").replace("/", "~1") for key in keys)])
