"""What an answer consists of when tools may be called: plain text, and calls with arguments that arrive in pieces."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class CallBegun:
    """index: 0, 1, ... among the calls of one answer."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallText:
    """More of a call's arguments: JSON text as the model wrote it."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """The arguments are complete. A call that the model never finished has no such piece."""

    index: int


Piece = str | CallBegun | CallText | CallEnded


class Parser(Protocol):
    """Reads what a model writes. The pieces of all calls, those of `finish` last, say the same for any cutting of the text:
    joined text, joined arguments and their order do not depend on it.
    """

    def feed(self, text: str, /) -> list[Piece]: ...
    def finish(self) -> list[Piece]:
        """The text has ended: what was held back."""
        ...


@dataclass
class Call:
    """A call as far as it has arrived; `arguments` need not be valid JSON if the model wrote none or was cut."""

    id: str
    name: str
    arguments: str = ""
    is_whole: bool = False


Block = str | Call


def joined(pieces: Iterable[Piece]) -> list[Block]:
    """The texts and calls of an answer, in their order; no text is empty, no two follow each other."""
    blocks: list[Block] = []
    for piece in pieces:
        if isinstance(piece, str):
            if blocks and isinstance(blocks[-1], str):
                blocks[-1] += piece
            elif piece:
                blocks.append(piece)
        elif isinstance(piece, CallBegun):
            blocks.append(Call(piece.id, piece.name))
        else:
            call = next(block for block in reversed(blocks) if isinstance(block, Call))
            if isinstance(piece, CallText):
                call.arguments += piece.text
            else:
                call.is_whole = True
    return blocks
