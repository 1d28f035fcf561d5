"""The pythonic form of Llama 3.2 and 4: a whole answer [f(a=1), g(b="x")], arguments as Python literals by name."""

from __future__ import annotations

import re
from typing import Any

from deployments.tools.base import BaseParser, find_tag
from deployments.tools.grammar import Form
from deployments.tools.python_call import Brackets, arguments_of

TAGS = ("<|python_tag|>", "<|python_start|>", "<|python_end|>")
_BETWEEN = " \t\r\n,"
FORM = Form("%s(", ")", begin="[", between=", ", end="]", never=_BETWEEN + "[<", keywords=True)  # "<": of a tag
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_LONGEST_NAME = 128


class PythonicParser(BaseParser):
    """A call goes out when it is closed: before, nobody knows whether its arguments are literals."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._state = "start"
        self._scan = Brackets()

    def _step(self) -> bool:
        if self._state == "text":
            return self._pass_text()
        char = self._buffer[0]
        if char in _BETWEEN or (char == "[" and self._state == "start"):
            if char == "[":
                self._state = "list"
            return self._set_aside(char)
        if self._state == "start":
            return self._meet_tag()
        if char == "]":
            self._state = "text"
            self._set_aside(char)
            if self._after_call:
                self._pending = ""
            return True
        return self._read_call()

    def _set_aside(self, text: str) -> bool:
        self._pending += text
        self._buffer = self._buffer[len(text) :]
        return True

    def _meet_tag(self) -> bool:
        at, tag = find_tag(self._buffer, TAGS)
        if at == 0 and tag is None:
            return False
        if at == 0 and tag is not None:
            self._buffer = self._buffer.removeprefix(tag)
            self._pend(tag)
        else:
            self._state = "text"
        return True

    def _pass_text(self) -> bool:
        at, tag = find_tag(self._buffer, TAGS)
        before, self._buffer = self._buffer[:at], self._buffer[at:]
        self._say(before)
        if tag is not None:
            self._buffer = self._buffer.removeprefix(tag)
            self._pend(tag)
        return tag is not None

    def _read_call(self) -> bool:
        match = _NAME.match(self._buffer)
        name = match[0] if match else ""
        if len(name) <= _LONGEST_NAME and name == self._buffer:
            return False
        if name not in self._names or self._buffer[len(name)] != "(":
            return self._fail()
        length = self._scan.find_end(self._buffer, len(name))
        if length is None:
            return self._fail() if self._scan.is_wrong else False
        arguments = arguments_of(self._buffer[len(name) : length])
        if arguments is None:
            return self._fail()
        self._buffer = self._buffer[length:]
        self._scan = Brackets()
        self._begin(name)
        self._argue(arguments)
        self._end()
        return True

    def _fail(self) -> bool:
        self._scan = Brackets()
        self._state = "text"
        return True
