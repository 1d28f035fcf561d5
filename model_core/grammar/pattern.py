"""Regular expressions as grammars: what both Python's and ECMAScript's dialect call a match, as one automaton can follow it.

Where the dialects differ, the sets of characters are those that both agree on: \\d is 0 to 9, and \\D is ASCII.
The whole text matches, as if the expression stood between ^ and $. Look-around, back references and flags are refused.
"""

from __future__ import annotations

import re
from typing import NoReturn

from model_core.errors import RequestError
from model_core.grammar.ebnf import (
    ANY,
    MAX_REPEAT,
    NOTHING,
    Ranges,
    Rules,
    common,
    counted,
    either,
    joined,
    one_of,
    union,
    without,
)

MAX_DEPTH = 30  # brackets in brackets
INVALID = "invalid_grammar"

_ASCII: Ranges = [(0, 0x7F)]
_DIGIT: Ranges = [(48, 57)]
_WORD: Ranges = [(48, 57), (65, 90), (95, 95), (97, 122)]
_SPACE: Ranges = [(9, 13), (32, 32), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029), (0x202F, 0x202F),
                  (0x205F, 0x205F), (0x3000, 0x3000)]  # fmt: skip
_SPACE_OF_ANY = union([*_SPACE, (0x1C, 0x1F), (0x85, 0x85), (0xFEFF, 0xFEFF)])  # white space in one of the dialects
_LINE_ENDS: Ranges = [(10, 10), (13, 13), (0x2028, 0x2029)]
_BEYOND_ASCII = without(ANY, _ASCII)
# by letter: characters that are in the class in every dialect, and in any dialect
_CLASSES: dict[str, tuple[Ranges, Ranges]] = {
    "d": (_DIGIT, union([*_DIGIT, *_BEYOND_ASCII])),
    "D": (without(_ASCII, _DIGIT), without(ANY, _DIGIT)),
    "w": (_WORD, union([*_WORD, *_BEYOND_ASCII])),
    "W": (without(_ASCII, _WORD), without(ANY, _WORD)),
    "s": (_SPACE, _SPACE_OF_ANY),
    "S": (without(ANY, _SPACE_OF_ANY), without(ANY, _SPACE)),
}
_CONTROL = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11, "0": 0}
_CODE = re.compile(r"x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})")
_BOUNDS = re.compile(r"\{(\d{1,9})(?:(,)(\d{0,9}))?\}")
# in a JSON string these are written as two characters; other control characters are never written
_IN_JSON = {'"': '"', "\\": "\\", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
PLAIN_IN_JSON = without(without(ANY, [(0, 31)]), [(34, 34), (92, 92)])
ESCAPED_IN_JSON = f'"\\\\" {one_of(union((ord(c), ord(c)) for c in _IN_JSON.values()))}'


def in_json(ranges: Ranges) -> str:
    """One character of a set as it stands in a JSON string: one that is written as it is, if there is such a one (the matcher
    counts single characters a thousand times faster than alternatives). "" if JSON has no short way to write any of them."""
    plain = common(ranges, PLAIN_IN_JSON)
    if plain:
        return one_of(plain)
    short = [(ord(name), ord(name)) for c, name in _IN_JSON.items() if common(ranges, [(ord(c), ord(c))])]
    return f'("\\\\" {one_of(union(short))})' if short else ""


def pattern_grammar(pattern: str, where: str, rules: Rules, param: str | None = None, *, json: bool = False) -> str:
    """The body of a rule, which may need others. where: the request's field, or the path in a schema, for what RequestError
    says. json: of a string in a JSON document, without its quotes."""
    return _Parser(pattern, where, rules, param or where, json).whole()


class _Parser:
    """Recursive descent; every method leaves `at` behind what it has read."""

    def __init__(self, pattern: str, where: str, rules: Rules, param: str, json: bool) -> None:
        self._pattern, self._where, self._rules, self._param, self._json = pattern, where, rules, param, json
        self._at = self._depth = 0

    def whole(self) -> str:
        body = self._alternatives()
        if self._at < len(self._pattern):
            self._refuse("')' without '('")
        return body

    def _refuse(self, what: str, why: str = "cannot be enforced") -> NoReturn:
        raise RequestError(f"{self._where}: {what} at character {self._at} {why}", param=self._param, code=INVALID)

    def _next(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _take(self, text: str) -> bool:
        found = self._pattern.startswith(text, self._at)
        self._at += len(text) * found
        return found

    def _alternatives(self) -> str:
        branches = [self._branch()]
        while self._take("|"):
            branches.append(self._branch())
        return either(branches)

    def _branch(self) -> str:
        parts = []
        if not self._depth:
            self._take("^")
        while self._next() not in ("", "|", ")"):
            if not self._depth and self._next() == "$" and self._pattern[self._at + 1 : self._at + 2] in ("", "|"):
                self._at += 1
                break
            parts.append(self._counted(self._piece()))
        return joined(*parts)

    def _piece(self) -> str:
        c = self._next()
        if c in "^$":
            self._refuse(f"the anchor '{c}' inside an expression")
        if c in "*+?" or (c == "{" and _BOUNDS.match(self._pattern, self._at)):
            self._refuse(f"'{c}', which repeats nothing,")
        if self._pattern.startswith("{,", self._at):
            self._refuse("'{,', which dialects read differently (write '{0,' or '\\{,'),")
        if self._take("("):
            return self._group()
        if self._take("["):
            return self._characters(self._set())
        if self._take("."):
            return self._characters(without(ANY, _LINE_ENDS))
        if self._take("\\"):
            return self._characters(self._escaped(wide=False))
        self._at += 1
        return self._characters(self._one(ord(c)))

    def _group(self) -> str:
        if not self._take("?:") and self._next() == "?":
            self._refuse(f"'({self._pattern[self._at : self._at + 3]}' (look-around, flags or a named group)")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self._refuse(f"more than {MAX_DEPTH} brackets in brackets")
        body = self._alternatives()
        self._depth -= 1
        if not self._take(")"):
            self._refuse("'(' without ')'")
        return body if body == NOTHING else f"({body})"

    def _counted(self, piece: str) -> str:
        bounds = _BOUNDS.match(self._pattern, self._at)
        if self._take("*"):
            low, high = 0, None
        elif self._take("+"):
            low, high = 1, None
        elif self._take("?"):
            low, high = 0, 1
        elif bounds:
            low = int(bounds[1])
            high = (int(bounds[3]) if bounds[3] else None) if bounds[2] else low
            if max(low, high or 0) > MAX_REPEAT:
                self._refuse(f"'{bounds.group()}', more than {MAX_REPEAT} repetitions,")
            if high is not None and high < low:
                self._refuse(f"'{bounds.group()}', a maximum below the minimum,")
            self._at = bounds.end()
        else:
            return piece
        self._take("?")  # as few as possible: the same texts match
        if self._next() in ("*", "+", "?") or _BOUNDS.match(self._pattern, self._at):
            self._refuse(f"'{self._next()}' behind a repetition")
        return piece if piece == NOTHING else counted(self._rules, piece, low, high)

    def _characters(self, ranges: Ranges) -> str:
        body = in_json(ranges) if self._json and ranges else one_of(ranges) if ranges else ""
        if not body:
            self._refuse("a character set with nothing in it that could be written", "is not possible")
        return body

    def _one(self, code: int) -> Ranges:
        if not common(ANY, [(code, code)]):
            self._refuse("half a surrogate pair, or one of the last four code points,")
        return [(code, code)]

    def _escaped(self, wide: bool) -> Ranges:
        """Behind a backslash. wide: of a class, all that any dialect counts to it."""
        c = self._next()
        code = _CODE.match(self._pattern, self._at)
        if code:
            self._at = code.end()
            return self._one(int(code[1] or code[2], 16))
        if not c or (c.isalnum() and c not in _CLASSES and c not in _CONTROL) or not c.isascii():
            self._refuse(f"'\\{c}'")
        self._at += 1
        if c == "0" and self._next().isdigit():
            self._refuse("an octal escape")
        return _CLASSES[c][wide] if c in _CLASSES else self._one(_CONTROL.get(c, ord(c)))

    def _set(self) -> Ranges:
        """Behind a '['."""
        negated = self._take("^")
        found: Ranges = []
        if self._next() == "]":  # a set of nothing, or a set that begins with it: dialects differ
            self._refuse("']' at the start of a character set")
        while not self._take("]"):
            low = self._member(negated)
            ends = self._pattern[self._at + 1 : self._at + 2]
            if self._next() == "-" and ends not in ("]", ""):
                self._at += 1
                high = self._member(negated)
                if low[0][0] != low[-1][1] or high[0][0] != high[-1][1] or low > high:
                    self._refuse("a range that does not go from one character to a later one", "is not possible")
                low = common(ANY, [(low[0][0], high[0][0])])
            found += low
        return without(ANY, union(found)) if negated else union(found)

    def _member(self, wide: bool) -> Ranges:
        c = self._next()
        if not c:
            self._refuse("'[' without ']'")
        self._at += 1
        if c == "\\":
            if self._take("b"):
                return self._one(8)
            return self._escaped(wide)
        if c == "[" or (c in "&|~-" and self._next() == c):
            self._refuse(f"'{c}' in a character set, which dialects read differently (write '\\{c}'),")
        return self._one(ord(c))

