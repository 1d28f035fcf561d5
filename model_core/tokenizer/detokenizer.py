"""Incremental detokenisation of one sequence: no half characters, no text past a stop string.

Invariant: all strings returned by push and finish, joined, equal Tokenizer.decode of all ids pushed (up to the stop),
for any cutting of the ids into pushes. With prompt_ids, they equal what those ids add to the decoded prompt.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections import deque
from collections.abc import Sequence

from model_core.errors import RequestError
from model_core.tokenizer.tokenizer import Tokenizer


class Detokenizer:
    """Text of one growing sequence.

    stop: strings that end the sequence. The one whose last character comes first wins, and of two that end together the
    longer, so the result does not depend on how tokens arrive. include_stop: return the stop string itself too.
    prompt_ids: what the sequence continues; without it the first token starts a text (its leading space is dropped by
    models whose decoder does that), with it the token stands inside a text.

    tokens_pushed: tokens given so far. tokens_sent: how many of them, from the first on, have all their text in what
    was returned (a token of no text counts with the text before it); log-probabilities of tokens_sent tokens can
    go out with that text. After a stop, tokens of the stop string stay uncounted; one that also carries text
    before it counts. After finish without a stop, tokens_sent == tokens_pushed.
    """

    __slots__ = ("_decoded", "_ends", "_heads", "_held", "_include", "_last_end", "_matchers", "_partial", "_pending",
                 "_returned", "_strip", "_table", "stopped", "tokens_pushed", "tokens_sent")

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
    ) -> None:
        table = tokenizer.byte_table(skip_special_tokens=skip_special_tokens)
        self._table = table
        if "" in stop:
            raise RequestError("a stop string is empty; leave it out", param="stop", code="invalid_value")
        self._matchers = [_Matcher(text) for text in stop]
        self._heads = frozenset(matcher.text[0] for matcher in self._matchers)
        self._partial = 0  # length of the longest beginning of a stop string that ends the text
        self._include = include_stop
        self._pending = _incomplete_tail(table, prompt_ids)  # bytes of a character that is not whole yet, at most 3
        self._strip = tokenizer.strips_space and not any(table[i] for i in prompt_ids if i < len(table))
        self._held = ""  # decoded, may be the beginning of a stop string
        self._decoded = 0  # characters decoded: those returned and those held
        self._returned = 0
        self._ends: deque[int] = deque()  # of tokens not sent: characters decoded once the token's text is whole
        self._last_end = 0  # the same of the last token that was sent
        self.stopped: str | None = None  # the stop string that was found
        self.tokens_pushed = 0
        self.tokens_sent = 0

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
            text += self._held
            self._held = ""
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
        if self._matchers:
            piece = self._watch(piece)
        self._returned += len(piece)
        if self._pending or self._held or self.stopped is not None:
            if new_token:
                self._ends.append(self._decoded + bool(self._pending))
            self._cover()
        else:
            if self._ends:
                self._ends.clear()
            self.tokens_sent = self.tokens_pushed
            self._last_end = self._decoded
        return piece

    def _watch(self, piece: str) -> str:
        """Look for stop strings in the text so far; return what cannot belong to one."""
        if not self._partial and self._heads.isdisjoint(piece):  # nearly every token: 0.2 us instead of 3
            return piece
        found: _Matcher | None = None
        found_end = 0
        for matcher in self._matchers:
            end = matcher.feed(piece)
            if end and (found is None or (end, -len(matcher.text)) < (found_end, -len(found.text))):
                found, found_end = matcher, end
        window = self._held + piece
        if found is not None:
            self.stopped = found.text
            end = len(self._held) + found_end
            self._held = ""
            return window[: end if self._include else end - len(found.text)]
        self._partial = max([matcher.matched for matcher in self._matchers])
        cut = len(window) - (0 if self._include else self._partial)  # included stop strings need not wait
        self._held = window[cut:]
        return window[:cut]

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


class _Matcher:
    """Finds one string in text that arrives in pieces (Knuth, Morris and Pratt 1977): linear for any input.

    matched: how many characters of the string the text now ends in.
    """

    __slots__ = ("_fallback", "matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        # _fallback[n]: the longest proper beginning of text that ends text[: n + 1]
        self._fallback = [0]
        n = 0
        for char in text[1:]:
            while n and text[n] != char:
                n = self._fallback[n - 1]
            n += text[n] == char
            self._fallback.append(n)

    def feed(self, piece: str) -> int:
        """Characters of `piece` up to the end of the first match, 0 if there is none. Not to be fed after a match."""
        text, n, start = self.text, self.matched, 0
        if not n:
            start = piece.find(text[0])
            if start < 0:
                return 0
        for at in range(start, len(piece)):
            char = piece[at]
            while n and text[n] != char:
                n = self._fallback[n - 1]
            n += text[n] == char
            if n == len(text):
                return at + 1
        self.matched = n
        return 0


def _incomplete_tail(table: list[bytes], prompt_ids: Sequence[int]) -> bytes:
    """The bytes at the end of a prompt that only begin a character."""
    tail = b""
    for i in reversed(prompt_ids):
        tail = (table[i] if i < len(table) else b"") + tail
        if len(tail) >= 3:
            break
    return tail[utf_8_decode(tail, "replace", False)[1] :]
