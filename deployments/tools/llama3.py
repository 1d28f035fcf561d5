"""Llama 3's JSON form: {"name": ..., "parameters": {...}}, <|python_tag|> before it or not, several joined by `; `."""

from __future__ import annotations

from deployments.tools.base import BaseParser, find_tag
from deployments.tools.call_object import CallObject
from deployments.tools.grammar import Form

TAG = "<|python_tag|>"
TAGS = (TAG,)
FORM = Form('{"name": "%s", "parameters": ', "}", between="; ", trigger='{"name": ')
_BETWEEN = " \t\r\n;,]}"


class LlamaParser(BaseParser):
    """Calls may stand anywhere in prose, as small models write them: only an object that names a function of the request, and
    has no keys but those of a call, is one. What follows broken arguments belongs to them, to the end.
    """

    _starts: tuple[str, ...] = (TAG, "{")

    def expect_form(self) -> None:
        self._starts = (FORM.trigger,)

    def _step(self) -> bool:
        if self._object is not None:
            return self._read()
        if self._state == "broken":
            self._argue(self._buffer)
            self._buffer = ""
            return True
        if self._state == "after" and (char := self._buffer[0]) in _BETWEEN:
            self._pending += char
            self._buffer = self._buffer[1:]
            return True
        at, start = find_tag(self._buffer, self._starts)
        before, self._buffer = self._buffer[:at], self._buffer[at:]
        if before:
            self._say(before)
            self._state = "text"
        if start == TAG:
            self._buffer = self._buffer.removeprefix(TAG)
            self._pend(TAG)
        elif start is not None:
            self._object = CallObject(self._names)
        return start is not None

    def _read(self) -> bool:
        event = self._read_object()
        if event == "ended":
            self._state = "after"
        return event != "more"
