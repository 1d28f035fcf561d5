"""Finding special tokens in text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in text before any other rule applies, such as "<|im_end|>".

    special: a control token, obeyed only where the caller allows it. lstrip / rstrip: the white space on that side
    belongs to the token.
    """

    text: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False


class Splitter:
    """Cuts text at a fixed set of tokens, leftmost first, the longest of those that start at one place.

    The expression is a trie, so time is linear in the text: 10 million characters a second on text without tokens, and
    at most (longest token) steps per character on adversarial text ("<|reserved_special_token_" repeated).
    """

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self._tokens = {token.text: token for token in tokens if token.text}
        self._found = re.compile(_trie(self._tokens)) if self._tokens else None
        # The same, for occurrences that overlap: a look-ahead consumes nothing.
        self._starts = re.compile(f"(?={_trie(self._tokens)})") if self._tokens else None
        self._heads = {text[:n] for text in self._tokens for n in range(1, len(text))}
        self._longest = max(map(len, self._tokens), default=0)

    def split(self, text: str) -> Iterator[tuple[str, AddedToken | None, int]]:
        """Yield (piece, token, start): a plain piece with token None, or a token's text with the token."""
        at = 0
        for match in self._found.finditer(text) if self._found else ():
            token = self._tokens[match.group()]
            start, end = match.span()
            if start < at:  # the white space that an rstrip token took cannot hold a token: never inside one
                continue
            plain = text[at:start]
            if token.lstrip:
                plain = plain.rstrip()
            if plain:
                yield plain, None, at
            yield token.text, token, start
            at = _SPACE.match(text, end).end() if token.rstrip else end  # type: ignore[union-attr]
        if at < len(text):
            yield text[at:], None, at

    def starts(self, text: str) -> list[int]:
        """Where tokens begin in `text`, overlapping ones included."""
        return [match.start() for match in self._starts.finditer(text)] if self._starts else []

    def ends_inside(self, text: str) -> bool:
        """Whether text that follows could complete a token: `text`, without white space at its end, ends in the proper
        beginning of one."""
        tail = text.rstrip()[-self._longest :]
        return any(tail[-n:] in self._heads for n in range(1, min(self._longest, len(tail) + 1)))

    def touches(self, text: str) -> bool:
        """Whether `text` holds a token or could begin one."""
        return bool(self._found and self._found.search(text)) or self.ends_inside(text)


def _trie(words: Iterable[str]) -> str:
    """A regular expression that matches the longest of `words` at a place, sharing common beginnings."""
    root: dict = {}
    for word in words:
        node = root
        for char in word:
            node = node.setdefault(char, {})
        node[""] = {}  # a word ends here

    def emit(node: dict) -> str:
        chain = ""
        while len(node) == 1 and "" not in node:  # no branch: emit a literal, so depth is that of branches only
            ((char, node),) = node.items()
            chain += re.escape(char)
        branches = [re.escape(char) + emit(child) for char, child in node.items() if char]
        if not branches:
            return chain
        return chain + f"(?:{'|'.join(branches)})" + ("?" if "" in node else "")

    return emit(root)
