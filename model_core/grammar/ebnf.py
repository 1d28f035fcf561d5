"""Writing grammars: rules, texts and sets of characters in the notation that the matcher reads (GBNF, rule `root`).

A set of characters is a sorted list of ranges of code points that do not touch. Only ranges that are there are ever written,
never "all but": the matcher lets "all but" through as bytes that are no UTF-8.
"""

from __future__ import annotations

from collections.abc import Iterable

Ranges = list[tuple[int, int]]
ANY: Ranges = [(0, 0xD7FF), (0xE000, 0x10FFFF)]  # every character that UTF-8 can say
NOTHING = '""'


class Rules:
    """The rules of a grammar in the making. Equal bodies share a rule."""

    def __init__(self) -> None:
        self._bodies: dict[str, str] = {}
        self._names: dict[str, str] = {}

    def name(self) -> str:
        """A new name, for `define`."""
        name = f"r{len(self._bodies)}"
        self._bodies[name] = NOTHING
        return name

    def define(self, name: str, body: str) -> None:
        self._bodies[name] = body

    def add(self, body: str) -> str:
        """The name of a rule with this body."""
        if body not in self._names:
            self._names[body] = name = self.name()
            self.define(name, body)
        return self._names[body]

    def text(self, root: str) -> str:
        """The whole grammar; it begins at a rule `root` with this body."""
        return "\n".join([*(f"{name} ::= {body}" for name, body in self._bodies.items()), f"root ::= {root}"])


def literal(text: str) -> str:
    """A text as it is. Raises ValueError for half a surrogate pair."""
    text.encode()
    return '"' + "".join(map(_quoted, text)) + '"'


def one_of(ranges: Ranges) -> str:
    """One character of a set that is not empty."""
    return "[" + "".join(_code(low) if low == high else f"{_code(low)}-{_code(high)}" for low, high in ranges) + "]"


def either(bodies: Iterable[str]) -> str:
    """An alternative, in brackets if there are several."""
    distinct = list(dict.fromkeys(bodies))
    return distinct[0] if len(distinct) == 1 else f"({' | '.join(distinct)})"


def repeated(body: str, low: int, high: int | None) -> str:
    """body: a name, a text, a set or something in brackets."""
    if (low, high) == (1, 1):
        return body
    if high == 0:
        return NOTHING
    sign = {(0, None): "*", (1, None): "+", (0, 1): "?"}.get((low, high))
    return body + (sign or f"{{{low},{'' if high is None else high}}}")


def union(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The set of all these."""
    found: Ranges = []
    for low, high in sorted(ranges):
        if found and low <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(high, found[-1][1]))
        else:
            found.append((low, high))
    return found


def without(ranges: Ranges, others: Ranges) -> Ranges:
    """Those characters of a set that are not in the other one."""
    found: Ranges = []
    for low, high in ranges:
        for start, end in others:
            if end < low or start > high:
                continue
            if start > low:
                found.append((low, start - 1))
            low = end + 1
        if low <= high:
            found.append((low, high))
    return found


def common(ranges: Ranges, others: Ranges) -> Ranges:
    """The characters that are in both sets."""
    return without(ranges, without([(0, 0x10FFFF)], others))


def _quoted(c: str) -> str:
    return {"\\": "\\\\", '"': '\\"'}.get(c) or (c if c.isascii() and c.isprintable() else _code(ord(c)))


def _code(code: int) -> str:
    if 48 <= code <= 57 or 65 <= code <= 90 or 97 <= code <= 122:
        return chr(code)
    return f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"
