"""Mistral's forms: [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...], and since 2025 [TOOL_CALLS]name[ARGS]{...}."""

from __future__ import annotations

import re

from deployments.tools.base import BaseParser
from deployments.tools.call_object import ArgumentsObject, CallObject
from deployments.tools.grammar import Form

OPEN = "[TOOL_CALLS]"
ARGS = "[ARGS]"
TAGS = (OPEN, "[CALL_ID]", ARGS)
FORM = Form('{"name": "%s", "arguments": ', "}", begin=OPEN + "[", between=", ", end="]", trigger=OPEN)
NEWER = Form(OPEN + "%s" + ARGS, "", trigger=OPEN)
_BETWEEN = " \t\r\n,;[]}"
_HEAD = re.compile(r"([A-Za-z0-9_.-]{1,256})\s*(?:\[CALL_ID\][A-Za-z0-9]*)?\s*(?:\[ARGS\])?\s*(?=\{)")
_HEAD_SO_FAR = re.compile(r"[A-Za-z0-9_.-]+\s*(?:\[[A-Za-z0-9_\]\[]*)?\s*")
_HEAD_LONGEST = 400


class MistralParser(BaseParser):
    """What follows broken arguments belongs to them, up to the next tag."""

    _takes_lists = True  # objects that follow a call

    def expect_form(self) -> None:
        self._takes_lists = False

    def _step(self) -> bool:
        if self._object is not None:
            return self._read()
        if self._state in ("tag", "list") and (read := self._read_list()) is not None:
            return read
        tag = self._next_tag(TAGS)
        if tag is None:
            return False
        if tag != OPEN:
            self._misplaced(tag)
            return True
        if self._state == "broken":
            self._skip_call()
        self._pend(OPEN)
        self._state = "tag"
        return True

    def _misplaced(self, tag: str) -> None:
        if self._state == "broken":
            self._argue(tag)
        else:
            self._state = "text"
            if tag not in self._hidden:
                self._say(tag)

    def _read_list(self) -> bool | None:
        """What may follow the tag, or a call: an object, or what lies between two; None for anything else."""
        char = self._buffer[0]
        if char == "{":
            self._object = CallObject()
        elif char in _BETWEEN and not any(tag.startswith(self._buffer[: len(tag)]) for tag in TAGS):
            self._pending += char
            self._buffer = self._buffer[1:]
            if not char.isspace():
                self._state = "list"
        else:
            return self._read_head() if self._state == "tag" else None
        return True

    def _read_head(self) -> bool | None:
        """A name and what lies between it and its arguments; without [ARGS], a name of the request's."""
        brace = self._buffer.find("{")
        if brace < 0:
            return False if len(self._buffer) < _HEAD_LONGEST and _HEAD_SO_FAR.fullmatch(self._buffer) else None
        match = _HEAD.match(self._buffer)
        if match is None or brace >= _HEAD_LONGEST or ("[ARGS]" not in match[0] and match[1] not in self._names):
            return None
        self._pending += self._buffer[:brace]
        self._buffer = self._buffer[brace:]
        self._object = ArgumentsObject(match[1])
        return True

    def _read(self) -> bool:
        follows = "list" if self._takes_lists or not isinstance(self._object, ArgumentsObject) else "text"
        event = self._read_object()
        if event == "ended":
            self._state = follows
        return event != "more"
