"""Writing grammars: rules, texts and sets of characters in the notation that the matcher reads (GBNF, rule `root`).

A set of characters is a sorted list of ranges of code points that do not touch. Only ranges that are there are ever written,
never "all but": the matcher lets "all but" through as bytes that are no UTF-8.

The last four code points, MARKS, stand for control tokens, which have no text: they are in no set and no text of a client's.
"""

from __future__ import annotations

from collections.abc import Iterable

Ranges = list[tuple[int, int]]
MARKS = "\U0010fffc\U0010fffd\U0010fffe\U0010ffff"  # for private use or no characters at all
ANY: Ranges = [(0, 0xD7FF), (0xE000, ord(MARKS[0]) - 1)]  # every other character that UTF-8 can say
NOTHING = '""'
GROUP = 128  # beyond it xgrammar 0.2.8 counts single characters in a way that lets wrong tokens into its masks
MAX_REPEAT = 10_000  # in groups; up to GROUP of them would be right
CHAIN = 512  # rules


class Rules:
    """The rules of a grammar in the making. Equal bodies share a rule. letter: their names begin with it."""

    def __init__(self, letter: str = "r") -> None:
        self._letter = letter
        self._bodies: dict[str, str] = {}
        self._names: dict[str, str] = {}

    def name(self) -> str:
        """A new name, for `define`."""
        name = f"{self._letter}{len(self._bodies)}"
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
    """A text as it is. Raises ValueError for half a surrogate pair, or a code point that is a mark."""
    text.encode()
    if not set(MARKS).isdisjoint(text):
        raise ValueError("a mark")
    return marked_literal(text)


def marked_literal(text: str) -> str:
    """The same of our own text, in which marks stand for control tokens."""
    return '"' + "".join(map(_quoted, text)) + '"'


def one_of(ranges: Ranges) -> str:
    """One character of a set that is not empty."""
    return "[" + "".join(_code(low) if low == high else f"{_code(low)}-{_code(high)}" for low, high in ranges) + "]"


def either(bodies: Iterable[str]) -> str:
    """An alternative, in brackets if there are several."""
    distinct = list(dict.fromkeys(bodies))
    return distinct[0] if len(distinct) == 1 else f"({' | '.join(distinct)})"


def repeated(body: str, low: int, high: int | None) -> str:
    """low to high times, at most MAX_REPEAT. body: a name, a text, a set or something in brackets."""
    if low <= GROUP and (high or 0) <= GROUP:
        return _few(body, low, high)
    group = f"({_few(body, GROUP, GROUP)})"
    groups, rest = divmod(low, GROUP)
    parts = [_few(group, groups, groups), _few(body, rest, rest)]
    if high is None:
        parts.append(_few(body, 0, None))
    elif high - low <= GROUP:
        parts.append(_few(body, 0, high - low))
    else:  # in one way only: some groups of all that there may be and less than a group more, or all of them and the rest
        groups, rest = divmod(high - low, GROUP)
        some = joined(_few(group, 0, groups - 1), _few(body, 0, GROUP - 1))
        parts.append(f"({some} | {joined(_few(group, groups, groups), _few(body, 0, rest))})")
    return f"({joined(*parts)})"


def chained(rules: Rules, body: str, low: int, high: int | None) -> str:
    """The name of a rule: low to high times (at least once), at most CHAIN, by a rule for each number, which others share.
    body: a set. Where a group of `repeated` ends, the matcher tries token by token what may go on behind it (85 ms for a string
    and 128k tokens, in which nobody else gets a token); here only what would be too long."""
    name = rules.add(f"{body}*") if high is None else ""
    for _ in range(0 if high is None else high - low):
        name = rules.add(f"{body} {name} | {NOTHING}" if name else f"{body}?")
    for _ in range(low):
        name = rules.add(f"{body} {name}".rstrip())
    return name


def counted(rules: Rules, body: str, low: int, high: int | None, *, beyond: int = GROUP) -> str:
    """low to high times, by whichever way is quick: `chained` where a set may come more than `beyond` times and CHAIN rules are
    enough for it, else `repeated`."""
    if body[0] == "[" and beyond < max(low, high or 0) <= CHAIN:
        return chained(rules, body, low, high)
    return repeated(body, low, high)


def joined(*bodies: str) -> str:
    """One behind the other."""
    return " ".join(body for body in bodies if body != NOTHING) or NOTHING


def _few(body: str, low: int, high: int | None) -> str:
    if (low, high) == (1, 1):
        return body
    if high == 0:
        return NOTHING
    if high is None and low and body[0] == "[":  # the matcher writes masks of a starred set 14 times as fast: 46 us, not 642,
        return joined(_few(body, low, low), body + "*")  # of 32 rows and 128k tokens
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
