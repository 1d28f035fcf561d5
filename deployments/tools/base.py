"""What the parsers of all families share: the text to be read, content that may still turn out to be none, and calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from deployments.tools.call_object import CallObject
from deployments.tools.pieces import CallBegun, CallEnded, CallText, Piece

Event = Literal["more", "ended", "broken", "failed"]


class BaseParser:
    """A subclass says in `_step` what becomes of the beginning of `_buffer`, by `_state`: "text" is content and where calls
    may begin, "broken" the arguments of a call that are no JSON.

    names: the functions that may be called. hidden: tags that are control tokens of the tokenizer, never part of content.
    new_id: makes the id of a call.
    """

    def __init__(self, names: frozenset[str], hidden: frozenset[str], new_id: Callable[[], str]) -> None:
        self._names = names
        self._hidden = hidden
        self._new_id = new_id
        self._buffer = ""
        self._state = "text"
        self._pending = ""  # goes out before more text, but not before a call, nor at the end if a call was the last thing
        self._object: CallObject | None = None
        self._calls = 0
        self._announced = False  # the call being read
        self._after_call = False
        self._out: list[Piece] = []

    def expect_form(self) -> None:
        """A grammar enforces the family's form: what else could be read as a call is none."""

    def feed(self, text: str, /) -> list[Piece]:
        self._buffer += text
        self._run()
        return self._take()

    def finish(self) -> list[Piece]:
        while self._object is not None and not self._object.begun:
            self._fail_object()
            self._run()
        if self._state == "broken":
            self._argue(self._buffer)
            self._skip_call()
        else:
            rest = self._buffer
            for tag in self._hidden:
                rest = rest.replace(tag, "")
            self._say(rest)
        if not self._after_call:
            self._put(self._pending)
        self._buffer = self._pending = ""
        return self._take()

    def _run(self) -> None:
        while self._buffer and self._step():
            pass

    def _step(self) -> bool:
        """Consume some of the buffer, which is not empty, or change what is expected; False if more text is needed."""
        raise NotImplementedError

    def _next_tag(self, tags: tuple[str, ...]) -> str | None:
        """Take the first of these tags off the buffer, after what lies before it: content, or more of a broken call's
        arguments. None if more text is needed for it."""
        at, tag = find_tag(self._buffer, tags)
        before, self._buffer = self._buffer[:at], self._buffer[at:].removeprefix(tag or "")
        if self._state == "broken":
            self._argue(before)
        elif before:
            self._say(before)
            self._state = "text"
        return tag

    # ---- content -------------------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        """Content. White space at its end waits for what follows: around calls it is the format's."""
        body = text.rstrip()
        if body:
            self._put(self._pending + body)
            self._pending = ""
            self._after_call = False
        self._pending += text[len(body) :]

    def _put(self, text: str) -> None:
        if text and self._out and isinstance(self._out[-1], str):
            self._out[-1] += text
        elif text:
            self._out.append(text)

    def _pend(self, tag: str) -> None:
        """A tag that is content only if no call follows."""
        if tag not in self._hidden:
            self._pending += tag

    def _take(self) -> list[Piece]:
        out, self._out = self._out, []
        return out

    # ---- calls ---------------------------------------------------------------------------------------------------------

    def _begin(self, name: str) -> None:
        self._pending = ""
        self._out.append(CallBegun(self._calls, self._new_id(), name))

    def _argue(self, text: str) -> None:
        last = self._out[-1] if self._out else None
        if text and isinstance(last, CallText):
            self._out[-1] = CallText(self._calls, last.text + text)
        elif text:
            self._out.append(CallText(self._calls, text))

    def _end(self) -> None:
        self._out.append(CallEnded(self._calls))
        self._skip_call()

    def _skip_call(self) -> None:
        """The next call is another one."""
        self._calls += 1
        self._after_call = True

    def _read_object(self) -> Event:
        """Reads on in `_object`. "failed": its text is back in the buffer, the first character as content."""
        call = self._object
        assert call is not None
        used = call.feed(self._buffer)
        self._buffer = self._buffer[used:]
        if call.begun and not self._announced:
            self._announced = True
            self._begin(call.name)
        if call.begun:
            self._argue(call.take())
        if call.state == "open":
            return "more"
        if call.state == "failed":
            self._fail_object()
            return "failed"
        self._object = None
        self._announced = False
        if call.state == "broken":
            self._state = "broken"
            return "broken"
        self._end()
        return "ended"

    def _fail_object(self) -> None:
        assert self._object is not None
        text, self._object = self._object.text, None
        self._state = "text"
        self._say(text[:1])
        self._buffer = text[1:] + self._buffer


def find_tag(text: str, tags: tuple[str, ...]) -> tuple[int, str | None]:
    """Where the first tag begins, and which; without one, where a tag may begin that only later text completes."""
    found = [(at, tag) for tag in tags if (at := text.find(tag)) >= 0]
    if found:
        return min(found)
    for at in range(max(len(text) - max(map(len, tags)) + 1, 0), len(text)):
        if any(tag.startswith(text[at:]) for tag in tags):
            return at, None
    return len(text), None
