"""Text of a sequence that may call tools: calls are taken out of it; stop strings are looked for in what is left."""

from __future__ import annotations

from collections.abc import Sequence

from deployments.tools.pieces import CallBegun, CallEnded, CallText, Parser, Piece
from model_core.tokenizer.detokenizer import Detokenizer
from model_core.tokenizer.stops import StopFinder


class CallReader:
    """A TextStream (see choice.py) whose `take` gives texts and calls in their order.

    detokenizer: without stop strings of its own, so that none can end a call in its middle. stop: strings that end the
    content, looked for after the first `min_tokens` tokens. most: calls after which the sequence ends; `stopped` is
    then "". Takes tokens one by one: what it says does not depend on how they arrive.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        parser: Parser,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        most: int = 1,
    ) -> None:
        self._detokenizer = detokenizer
        self._parser = parser
        self._stops = StopFinder(stop, include=include_stop) if stop else None
        self._min_tokens = min_tokens
        self._most = most
        self._ready: list[Piece] = []
        self.stopped: str | None = None
        self.tokens_sent = 0
        self.begun = 0  # calls
        self.whole = 0  # of them

    def push(self, ids: Sequence[int], /) -> str:
        """"": the text is among the pieces."""
        for i in ids:
            if self.stopped is not None:
                break
            self._add(self._parser.feed(self._detokenizer.push((i,))))
            if not self.stopped:  # neither the tokens of a stop string nor those behind it count
                self.tokens_sent = self._detokenizer.tokens_sent
        return ""

    def finish(self) -> str:
        text = self._detokenizer.finish()
        self._add([*self._parser.feed(text), *self._parser.finish()])
        if self.stopped is None:
            self._flush()
            self.tokens_sent = self._detokenizer.tokens_sent
        return ""

    def take(self) -> list[Piece]:
        """The pieces since the last call."""
        ready, self._ready = self._ready, []
        return ready

    def _add(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            if isinstance(piece, str):
                self._say(piece)
            elif isinstance(piece, CallBegun) and self.begun == self._most:  # the last one had no end
                self.stopped = ""
            else:
                self._flush()
                self._put(piece)
                self.begun += isinstance(piece, CallBegun)
                if isinstance(piece, CallEnded):
                    self.whole += 1
                    self.stopped = "" if self.begun == self._most else None
            if self.stopped is not None:
                return

    def _say(self, text: str) -> None:
        stops = self._stops
        if stops is not None and self._detokenizer.tokens_pushed > self._min_tokens:
            text = stops.feed(text)
            self.stopped = stops.found
        self._put(text)

    def _flush(self) -> None:
        """No stop string reaches over a call."""
        if self._stops is not None:
            self._put(self._stops.flush())

    def _put(self, piece: Piece) -> None:
        last = self._ready[-1] if self._ready else None
        if isinstance(piece, str) and isinstance(last, str):
            self._ready[-1] = last + piece
        elif isinstance(piece, CallText) and isinstance(last, CallText):
            self._ready[-1] = CallText(piece.index, last.text + piece.text)
        elif piece:
            self._ready.append(piece)
