"""Hermes' form, also of Qwen and SmolLM2: <tool_call>{"name": ..., "arguments": {...}}</tool_call>, once per call."""

from __future__ import annotations

from deployments.tools.base import BaseParser
from deployments.tools.call_object import CallObject
from deployments.tools.grammar import Form

OPEN, CLOSE = "<tool_call>", "</tool_call>"
TAGS = (OPEN, CLOSE)
FORM = Form(OPEN + '\n{"name": "%s", "arguments": ', "}\n" + CLOSE, between="\n", trigger=OPEN)
_BETWEEN = " \t\r\n,;[]}"  # a list of calls in one tag (SmolLM2), a brace too many


class HermesParser(BaseParser):
    """Arguments go out while they come; after they have begun, what is no JSON stays part of them, up to the closing tag."""

    _closes_call = False  # the next closing tag belongs to a call

    def _step(self) -> bool:
        if self._object is not None:
            return self._read()
        if self._state == "tag" and (char := self._buffer[0]) in _BETWEEN + "{":
            if char == "{":
                self._object = CallObject()
            else:
                self._pending += char
                self._buffer = self._buffer[1:]
            return True
        tag = self._next_tag(TAGS)
        if tag is None:
            return False
        self._meet(tag)
        return True

    def _meet(self, tag: str) -> None:
        if self._state == "broken":
            self._skip_call()
        self._state = "tag" if tag == OPEN else "text"
        if tag == OPEN:
            self._pend(tag)
        elif self._closes_call:
            self._pending = ""
        elif tag not in self._hidden:
            self._say(tag)
        self._closes_call = False

    def _read(self) -> bool:
        event = self._read_object()
        if event == "ended":
            self._state = "tag"
        if event in ("ended", "broken"):
            self._closes_call = True
        return event != "more"
