"""Answers under a grammar that allows calls alone, or else a text of some form: its beginning decides which of them it is."""

from __future__ import annotations

from deployments.tools.pieces import Parser, Piece


class CallsParser:
    """Nothing but calls. One that max_tokens cut off before it can be told of is not shown: it is no content."""

    def __init__(self, calls: Parser) -> None:
        self._calls = calls

    def feed(self, text: str, /) -> list[Piece]:
        return self._calls.feed(text)

    def finish(self) -> list[Piece]:
        return [piece for piece in self._calls.finish() if not isinstance(piece, str)]


class EitherParser:
    """beginnings: of calls, and of no other answer. calls: reads them. Any other answer is content, whatever is in it."""

    def __init__(self, beginnings: tuple[str, ...], calls: Parser) -> None:
        self._beginnings = beginnings
        self._calls, self._undecided = CallsParser(calls), calls
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
        if self._is_call is not None:
            return self._calls.finish() if self._is_call else []
        text, self._buffer = self._buffer, ""  # the parser knows what of a call's beginning nobody may see
        return [*self._undecided.feed(text), *self._undecided.finish()]
