"""One call as a JSON object, {"name": ..., "arguments": {...}}, while it arrives."""

from __future__ import annotations

import json
from typing import Any, Literal

from deployments.tools.json_scan import JsonScanner, Mark

MAX_NAME = 256  # characters with quotes; beyond it a string is no name, nor a key of a call
MAX_DOUBT = 1024  # characters within which an object without a tag must turn out to be a call
_NAME_KEYS = ("name", "function")
_ARGUMENT_KEYS = ("arguments", "parameters")
_KEYS = frozenset((*_NAME_KEYS, *_ARGUMENT_KEYS, "type", "id"))


class CallObject:
    """Takes the text of one object from its `{` on.

    names: if given, the object is a call only if its name is one of them, it has arguments, and it has no keys but those of
    a call: what a call without any tag around it must be, for a JSON answer may look much like one.

    state
      open    more text is needed
      done    a call, complete
      broken  a call whose arguments are not JSON; the text that could not be taken, and what follows, belongs to them
      failed  no call: `text` is what was taken
    begun: it is certain that this is a call, and its `name` is known; its arguments, from then on, do not wait for its end.
    """

    def __init__(self, names: frozenset[str] | None = None) -> None:
        self.state: Literal["open", "done", "broken", "failed"] = "open"
        self.begun = False
        self.name = ""
        self.text = ""
        self._names = names
        self._scanner = JsonScanner()
        self._key = ""
        self._arguments: tuple[int, int | None] | None = None  # where they lie, once they have begun (ended)
        self._taken = 0

    def feed(self, text: str) -> int:
        """How many characters of `text` belong to the object."""
        head = MAX_DOUBT - self._scanner.length
        if self._names is None or not 0 < head < len(text):
            return self._feed(text)
        used = self._feed(text[:head])  # what it is does not depend on how the text is cut
        return used + self._feed(text[head:]) if self.state == "open" else used

    def _feed(self, text: str) -> int:
        scanner = self._scanner
        used = scanner.feed(text)
        self.text += text[:used]
        for mark in scanner.marks:
            if self.state == "open":
                self._see(mark)
        scanner.marks.clear()
        if self.state != "open":
            return used
        if scanner.failed:
            ended = self._arguments is not None and self._arguments[1] is not None
            self.state = ("done" if ended else "broken") if self.begun else "failed"
        elif scanner.done:
            self._close()
        elif self._names is not None and not self.begun and self._arguments is None and scanner.length >= MAX_DOUBT:
            self.state = "failed"
        return used

    def take(self) -> str:
        """The arguments since the last call; only of an object that has begun."""
        if self._arguments is None:
            return ""
        start, end = self._arguments
        piece = self.text[start + self._taken : end]
        self._taken += len(piece)
        return piece

    def _see(self, mark: Mark) -> None:
        if self.begun:
            if mark.kind == "end" and self._arguments is not None and self._arguments[1] is None:
                self._arguments = (mark.start, mark.end)
            return
        if mark.kind == "key":
            self._key = self._string(mark)
            if self._names is not None and self._key not in _KEYS:
                self.state = "failed"
        elif self._key in _NAME_KEYS and mark.kind == "end" and self.text.startswith('"', mark.start):
            self.name = self._string(mark)
            if self._names is not None and self.name not in self._names:
                self.state = "failed"
        elif self._key in _ARGUMENT_KEYS and mark.kind == "value" and self._is_object(mark.start):
            self._arguments = (mark.start, None)
        elif self._key in _ARGUMENT_KEYS and mark.kind == "end" and self._is_object(mark.start):
            self._arguments = (mark.start, mark.end)
        self.begun = bool(self.name) and self._arguments is not None

    def _is_object(self, at: int) -> bool:
        return self.text.startswith("{", at)

    def _string(self, mark: Mark) -> str:
        """The string at a mark; "" for one that is too long."""
        if mark.end - mark.start > MAX_NAME:
            return ""
        return _clean(json.loads(self.text[mark.start : mark.end])) or ""

    def _close(self) -> None:
        """The object is complete. If it has not begun, its arguments may be written in another way."""
        self.state = "done"
        if self.begun:
            return
        whole = json.loads(self.text)
        if isinstance(whole.get("function"), dict):  # as the API itself writes a call
            whole = whole["function"]
        name = next((whole[key] for key in _NAME_KEYS if isinstance(whole.get(key), str)), "")
        name = _clean(name) or ""
        given = next((whole[key] for key in _ARGUMENT_KEYS if key in whole), None if self._names is None else False)
        arguments = _as_text(given)
        if not name or len(name) > MAX_NAME or arguments is None or (self._names is not None and name not in self._names):
            self.state = "failed"
            return
        self.begun, self.name = True, name
        self.text, self._arguments = arguments, (0, len(arguments))


class ArgumentsObject(CallObject):
    """The arguments alone, of a call whose name came before them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.begun, self.name = True, name
        self._arguments = (0, None)

    def _see(self, mark: Mark) -> None:
        pass

    def _close(self) -> None:
        self.state = "done"
        self._arguments = (0, len(self.text))


def _as_text(arguments: Any) -> str | None:
    """Arguments as JSON text: an object, the text of one, or none at all; else None."""
    if arguments is None:
        return "{}"
    if isinstance(arguments, dict):
        return _clean(json.dumps(arguments, ensure_ascii=False)) or json.dumps(arguments)
    try:
        return _clean(arguments) if isinstance(arguments, str) and isinstance(json.loads(arguments), dict) else None
    except (ValueError, RecursionError):
        return None


def _clean(text: str) -> str | None:
    """None for text with half a surrogate pair, which JSON can write but UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return None
    return text
