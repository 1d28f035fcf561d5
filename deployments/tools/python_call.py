"""The arguments of a call in Python's form, (a=1, b="x"): literals only, read and never evaluated."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

MAX_DEPTH = 32
_PLAIN = re.compile(r"[^\"'()\[\]{}\\]+")
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_TOKEN = re.compile(
    r"""\s*(?:(?P<string>"[^"\\\n]*(?:\\.[^"\\\n]*)*"|'[^'\\\n]*(?:\\.[^'\\\n]*)*')"""
    r"""|(?P<number>-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<word>[^\W\d]\w*)|(?P<mark>[\[\](){},:=]))""",
    re.DOTALL | re.ASCII,
)


class Brackets:
    """Finds the end of a bracketed text that grows; looks at no character twice. is_wrong: it cannot be one."""

    def __init__(self) -> None:
        self.is_wrong = False
        self._at = 0
        self._open: list[str] = []
        self._quote = ""

    def find_end(self, text: str, start: int) -> int | None:
        """Where the bracket at `start` is closed (behind it), None if it is not yet. The same text as before, or longer."""
        self._at = max(self._at, start)
        while self._at < len(text) and not self.is_wrong:
            char = text[self._at]
            if char == "\\":
                if self._at + 1 == len(text):
                    return None
                self._at += 2
                self.is_wrong = not self._quote
                continue
            plain = _PLAIN.match(text, self._at)
            self._at = plain.end() if plain else self._at + 1
            if self._quote:
                self._quote = "" if char == self._quote else self._quote
            elif char in "\"'":
                self._quote = char
            elif char in _CLOSING:
                self._open.append(_CLOSING[char])
                self.is_wrong = len(self._open) > MAX_DEPTH
            elif char in ")]}":
                self.is_wrong = self._open.pop() != char
                if not self._open and not self.is_wrong:
                    return self._at
        return None


def arguments_of(text: str) -> str | None:
    """`(a=1, b="x")` as the text of a JSON object; None if it is not that."""
    try:
        written = json.dumps(_Reader(text).arguments(), ensure_ascii=False, allow_nan=False)
        written.encode()
    except (ValueError, SyntaxError):
        return None
    return written


class _Reader:
    """Recursive descent over tokens, as deep as MAX_DEPTH brackets. Raises ValueError for what is no literal."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._kind = self._token = ""
        self._next()

    def arguments(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        self._expect("(")
        while self._token != ")":
            name = self._token
            if self._kind != "word" or name in values:
                raise ValueError("no name")
            self._next()
            self._expect("=")
            values[name] = self._value(1)
            if self._token != ")":
                self._expect(",")
        if self._at != len(self._text):
            raise ValueError("text behind the call")
        return values

    def _value(self, depth: int) -> Any:
        kind, token = self._kind, self._token
        if depth > MAX_DEPTH:
            raise ValueError("too deep")
        self._next()
        if kind == "string":
            return ast.literal_eval(token)
        if kind == "number":
            return int(token) if token.removeprefix("-").isdigit() else float(token)
        if token in ("[", "("):
            return self._items(_CLOSING[token], depth)
        if token == "{":
            return dict(self._items("}", depth))
        if token not in _WORDS or kind != "word":
            raise ValueError("no literal")
        return _WORDS[token]

    def _items(self, end: str, depth: int) -> list[Any]:
        items: list[Any] = []
        while self._token != end:
            if end == "}":
                if self._kind != "string":
                    raise ValueError("no key")
                key = self._value(depth + 1)
                self._expect(":")
                items.append((key, self._value(depth + 1)))
            else:
                items.append(self._value(depth + 1))
            if self._token != end:
                self._expect(",")
        self._next()
        return items

    def _expect(self, mark: str) -> None:
        if self._token != mark or self._kind != "mark":
            raise ValueError(f"no {mark}")
        self._next()

    def _next(self) -> None:
        match = _TOKEN.match(self._text, self._at)
        if match is None:
            self._kind = self._token = ""
            return
        self._at = match.end()
        self._kind = match.lastgroup or ""
        self._token = match[self._kind]
