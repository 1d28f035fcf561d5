"""Incremental detokenisation of one sequence: no half characters, no text past a stop string.

Invariant: all strings returned by push and finish, joined, equal Tokenizer.decode of all ids pushed (up to the stop),
for any cutting of the ids into pushes. With prompt_ids, they equal what those ids add to the decoded prompt.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections import deque
from collections.abc import Sequence

from model_core.tokenizer.stops import StopFinder
from model_core.tokenizer.tokenizer import Tokenizer


class Detokenizer:
    """Text of one growing sequence.

    stop: strings that end the sequence. The one whose last character comes first wins, and of two that end together the
    longer, so the result does not depend on how tokens arrive. include_stop: return the stop string itself too.
    keep: special tokens that are never skipped.
    prompt_ids: what the sequence continues; without it the first token starts a text (its leading space is dropped by
    models whose decoder does that), with it the token stands inside a text.

    tokens_pushed: tokens given so far. tokens_sent: how many of them, from the first on, have all their text in what
    was returned (a token of no text counts with the text before it); log-probabilities of tokens_sent tokens can
    go out with that text. After a stop, tokens of the stop string stay uncounted; one that also carries text
    before it counts. After finish without a stop, tokens_sent == tokens_pushed.
    """

    __slots__ = ("_decoded", "_ends", "_last_end", "_pending", "_returned", "_stops", "_strip", "_table", "tokens_pushed",
                 "tokens_sent")

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        keep: frozenset[int] = frozenset(),
        prompt_ids: Sequence[int] = (),
    ) -> None:
        table = tokenizer.byte_table(skip_special_tokens=skip_special_tokens, keep=keep)
        self._table = table
        self._stops = StopFinder(stop, include=include_stop) if stop else None
        self._pending = _incomplete_tail(table, prompt_ids)  # bytes of a character that is not whole yet, at most 3
        self._strip = tokenizer.strips_space and not any(table[i] for i in prompt_ids if i < len(table))
        self._decoded = 0  # characters decoded: those returned and those held
        self._returned = 0
        self._ends: deque[int] = deque()  # of tokens not sent: characters decoded once the token's text is whole
        self._last_end = 0  # the same of the last token that was sent
        self.tokens_pushed = 0
        self.tokens_sent = 0

    @property
    def stopped(self) -> str | None:
        """The stop string that was found."""
        return None if self._stops is None else self._stops.found

    def push(self, ids: Sequence[int]) -> str:
        """Take the next ids; return the text that may be sent now, "" while there is none or after a stop."""
        text = ""
        for i in ids:
            self.tokens_pushed += 1
            if self.stopped is not None:
                continue
            try:
                data = self._table[i]
            except IndexError:  # a padded row of the model's head: no such token
                data = b""
            if self._pending:
                data = self._pending + data
            piece, used = utf_8_decode(data, "replace", False)
            self._pending = data[used:]
            text += self._advance(piece)
        return text

    def finish(self) -> str:
        """The sequence ends: return what was held back; an incomplete character becomes U+FFFD."""
        if self.stopped is not None:
            return ""
        piece, _ = utf_8_decode(self._pending, "replace", True)
        self._pending = b""
        text = self._advance(piece, new_token=False)
        if self.stopped is None:
            text += "" if self._stops is None else self._stops.flush()
            self._returned = self._decoded
            self._ends.clear()
            self.tokens_sent = self.tokens_pushed
        return text

    def _advance(self, piece: str, new_token: bool = True) -> str:
        """Account for one token that decoded to `piece`; return what may be sent."""
        if self._strip and piece:
            self._strip = False
            piece = piece.removeprefix(" ")
        self._decoded += len(piece)
        stops = self._stops
        is_held = False
        if stops is not None:
            piece = stops.feed(piece)
            is_held = bool(stops.held) or stops.found is not None
        self._returned += len(piece)
        if self._pending or is_held:
            if new_token:
                self._ends.append(self._decoded + bool(self._pending))
            self._cover()
        else:
            if self._ends:
                self._ends.clear()
            self.tokens_sent = self.tokens_pushed
            self._last_end = self._decoded
        return piece

    def _cover(self) -> None:
        """Count the tokens whose text has been returned."""
        ends, returned = self._ends, self._returned
        while ends and ends[0] <= returned:
            self._last_end = ends.popleft()
            self.tokens_sent += 1
        if self.stopped is not None and ends:
            if self._last_end < returned:  # the next token carries the last characters before the stop string
                self.tokens_sent += 1
            ends.clear()


def _incomplete_tail(table: list[bytes], prompt_ids: Sequence[int]) -> bytes:
    """The bytes at the end of a prompt that only begin a character."""
    tail = b""
    for i in reversed(prompt_ids):
        tail = (table[i] if i < len(table) else b"") + tail
        if len(tail) >= 3:
            break
    return tail[utf_8_decode(tail, "replace", False)[1] :]
