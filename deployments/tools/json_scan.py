"""A JSON object that arrives in pieces: whether the text so far begins one, and where the values of its members lie."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

MAX_DEPTH = 64
_SPACE = " \t\n\r"
_IN_STRING = re.compile(r'[^"\\\x00-\x1f]*')
_WORD = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")

_State = Literal["value", "item", "key", "first key", "colon", "next", "string", "escape", "word"]


class Mark(NamedTuple):
    """Something about a member of the outermost object. at: characters from its `{`; those of a string count its quotes."""

    kind: Literal["key", "value", "end"]  # a key is complete; a value begins; a value has ended
    start: int
    end: int


class JsonScanner:
    """Takes text that should begin with `{`, character by character in effect.

    done: the object is closed. failed: no continuation of the text taken would be JSON (RFC 8259), or it is nested deeper
    than MAX_DEPTH. A number is checked when it ends. length: characters taken; those after `done` or from the one that
    failed on are not taken.
    """

    def __init__(self) -> None:
        self.done = False
        self.failed = False
        self.length = 0
        self.marks: list[Mark] = []
        self._stack = ""
        self._state: _State = "value"
        self._is_key = False
        self._hex = 0  # digits of \uXXXX that are due
        self._word = ""
        self._start = 0  # of the outermost member's key or value

    def feed(self, text: str) -> int:
        """How many characters of `text` were taken."""
        at = 0
        while at < len(text) and not (self.done or self.failed):
            if self._state == "string" and (match := _IN_STRING.match(text, at)) and match.end() > at:
                self.length += match.end() - at
                at = match.end()
            elif self._step(text[at]):
                self.length += 1
                at += 1
            else:
                self.failed = True
        return at

    def _step(self, char: str) -> bool:
        state = self._state
        if state == "string":
            if char == '"':
                self._end_string()
            elif char == "\\":
                self._state = "escape"
            return char in '"\\'
        if state == "escape":
            if self._hex:
                self._hex -= 1
                is_right = char in "0123456789abcdefABCDEF"
            else:
                self._hex = 4 if char == "u" else 0
                is_right = char in '"\\/bfnrtu'
            if not self._hex:
                self._state = "string"
            return is_right
        if state == "word":
            if char not in ",]}" and char not in _SPACE:
                self._word += char
                return len(self._word) <= 400 and char in "+-.0123456789aeflnrstuE"
            if not _WORD.fullmatch(self._word):
                return False
            self._end_value(self.length)
            state = self._state
        if char in _SPACE:
            return True
        return self._structure(char, state)

    def _structure(self, char: str, state: _State) -> bool:
        if state == "next":
            if char == ",":
                self._state = "key" if self._stack[-1] == "{" else "value"
                return True
            return char == ("}" if self._stack[-1] == "{" else "]") and self._close()
        if state == "colon":
            self._state = "value"
            return char == ":"
        if state in ("key", "first key"):
            if char == "}" and state == "first key":
                return self._close()
            return char == '"' and self._begin_string(is_key=True)
        if char == "]" and state == "item":
            return self._close()
        self._begin_value()
        if char == '"':
            return self._begin_string(is_key=False)
        if char in "{[":
            self._stack += char
            self._state = "first key" if char == "{" else "item"
            return len(self._stack) <= MAX_DEPTH and (char == "{" or len(self._stack) > 1)
        self._state = "word"
        self._word = char
        return bool(self._stack) and char in "-0123456789tfn"

    def _begin_string(self, *, is_key: bool) -> bool:
        self._is_key = is_key
        self._state = "string"
        if is_key and len(self._stack) == 1:
            self._start = self.length
        return bool(self._stack)

    def _end_string(self) -> None:
        if not self._is_key:
            self._end_value(self.length + 1)
            return
        self._state = "colon"
        if len(self._stack) == 1:
            self.marks.append(Mark("key", self._start, self.length + 1))

    def _begin_value(self) -> None:
        if len(self._stack) == 1:
            self._start = self.length
            self.marks.append(Mark("value", self._start, self._start))

    def _end_value(self, end: int) -> None:
        self._state = "next"
        if len(self._stack) == 1:
            self.marks.append(Mark("end", self._start, end))

    def _close(self) -> bool:
        self._stack = self._stack[:-1]
        if self._stack:
            self._end_value(self.length + 1)
        else:
            self.done = True
        return True
