"""Answers under a grammar that allows calls or a text of some form: its beginning decides which of them it is."""

from __future__ import annotations

from deployments.tools.pieces import Parser, Piece


class EitherParser:
    """beginnings: of calls, and of no other answer. calls: reads them. Any other answer is content, whatever is in it."""

    def __init__(self, beginnings: tuple[str, ...], calls: Parser) -> None:
        self._beginnings = beginnings
        self._calls = calls
        self._buffer = ""
        self._is_call: bool | None = None  # None: not decided yet

    def feed(self, text: str, /) -> list[Piece]:
        if self._is_call is None:
            self._buffer += text
            if self._buffer.startswith(self._beginnings):
                self._is_call = True
            elif not any(beginning.startswith(self._buffer) for beginning in self._beginnings):
                self._is_call = False
            else:
                return []
            text, self._buffer = self._buffer, ""
        return self._calls.feed(text) if self._is_call else [text] if text else []

    def finish(self) -> list[Piece]:
        if self._is_call is False:
            return []
        text, self._buffer = self._buffer, ""  # not decided: the parser knows what of a call's beginning nobody may see
        return [*(self._calls.feed(text) if text else []), *self._calls.finish()]
