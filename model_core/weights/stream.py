"""Tensors from files to a GPU: threads read into pinned buffers while the copy engine empties others.

Copying from a mapped file, as StoredTensor.read_into does, keeps one core busy with page faults and the driver's own staging.
Here each of a few threads has two buffers: the copy out of one runs while the next bytes are read into the other. Reading
releases the GIL, and so the rest of a start-up goes on meanwhile.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model_core.errors import CheckpointError
from model_core.threads import over_threads
from model_core.weights.checkpoint import StoredTensor

CHUNK = 4 << 20  # bytes of a buffer
READERS = 8  # threads at most: pinned memory is READERS * 2 * CHUNK = 64 MiB, which torch keeps for later copies
_ALIGNMENT = 16  # bytes, of tensors in a buffer: views of any dtype
AVAILABLE = hasattr(os, "preadv")  # not on Windows


@dataclass(frozen=True)
class Piece:
    """Elements that lie one after the other in a file, and their place: `target`, one-dimensional. at: their first byte in a
    buffer."""

    name: str
    path: Path
    offset: int
    dtype: torch.dtype
    target: torch.Tensor
    at: int

    @property
    def nbytes(self) -> int:
        return self.target.numel() * self.dtype.itemsize


def stream(wanted: Iterable[tuple[StoredTensor, torch.Tensor]], device: torch.device) -> Iterator[int]:
    """Fill each contiguous target, on `device`, with its tensor, which must have a span; other dtypes are converted there.

    Yields the bytes of one chunk after the other as they were read; all targets are filled when it ends. Raises
    CheckpointError, naming the file, where one ends too early or cannot be read. On a CPU (tests) copies are not asynchronous.
    """
    chunks = chunks_of(wanted, CHUNK)
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None
    if copies is not None:
        copies.wait_stream(torch.cuda.current_stream(device))  # what filled the targets before
    own = threading.local()
    with ExitStack() as stack:
        paths = {piece.path for pieces in chunks for piece in pieces}
        files = {path: stack.enter_context(_open(path)).fileno() for path in paths}

        def move(pieces: list[Piece]) -> int:
            if not hasattr(own, "staging"):
                own.staging = _Staging(copies)
            staging: _Staging = own.staging
            buffer, view = staging.turn()
            for piece in pieces:
                _read(files[piece.path], piece, view[piece.at : piece.at + piece.nbytes])
            staging.send(buffer, pieces)
            return sum(piece.nbytes for piece in pieces)

        try:
            yield from over_threads(move, chunks, min(READERS, os.cpu_count() or 1))
        finally:
            if copies is not None:
                copies.synchronize()  # also after an error: nobody may write to targets that are freed


def chunks_of(wanted: Iterable[tuple[StoredTensor, torch.Tensor]], capacity: int) -> list[list[Piece]]:
    """Everything, in the files' order, in portions that fit a buffer of `capacity` bytes: a portion is part of a large tensor,
    or several small ones."""
    spans = [(stored.name, stored.span, target) for stored, target in wanted if stored.span is not None]
    chunks: list[list[Piece]] = []
    room = 0
    for name, span, target in sorted(spans, key=lambda one: (one[1].path, one[1].offset)):
        size, flat, done = span.dtype.itemsize, target.view(-1), 0
        while done < len(flat):
            if room < size:
                chunks.append([])
                room = capacity
            part = flat[done : done + room // size]
            chunks[-1].append(Piece(name, span.path, span.offset + done * size, span.dtype, part, capacity - room))
            done += len(part)
            room -= -(-len(part) * size // _ALIGNMENT) * _ALIGNMENT
    return chunks


class _Staging:
    """A thread's two buffers. copies: the stream of the copies out of them, None on a CPU."""

    def __init__(self, copies: torch.cuda.Stream | None) -> None:
        self._copies = copies
        self._buffers = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=copies is not None) for _ in range(2)]
        self._views = [memoryview(buffer.numpy()) for buffer in self._buffers]  # type: ignore[arg-type]
        self._copied = [None if copies is None else torch.cuda.Event() for _ in range(2)]
        self._turn = 0

    def turn(self) -> tuple[torch.Tensor, memoryview]:
        """The buffer that was sent longer ago; waits until it is empty."""
        self._turn = 1 - self._turn
        if (copied := self._copied[self._turn]) is not None:
            copied.synchronize()  # returns at once if it was never recorded
        return self._buffers[self._turn], self._views[self._turn]

    def send(self, buffer: torch.Tensor, pieces: list[Piece]) -> None:
        """Start copying the pieces to their targets."""
        context: Any = nullcontext() if self._copies is None else torch.cuda.stream(self._copies)
        with context:
            for piece in pieces:
                stored = buffer[piece.at : piece.at + piece.nbytes].view(piece.dtype)
                if stored.dtype != piece.target.dtype:  # copy_ would convert before it copies, on the CPU
                    stored = stored.to(piece.target.device, non_blocking=True)
                piece.target.copy_(stored, non_blocking=True)
            if (copied := self._copied[self._turn]) is not None:
                copied.record(self._copies)


def _open(path: Path) -> Any:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def _read(file: int, piece: Piece, view: memoryview) -> None:
    done = 0
    while done < len(view):
        try:
            count = os.preadv(file, [view[done:]], piece.offset + done)
        except OSError as error:
            raise CheckpointError(f"{piece.path} cannot be read at byte {piece.offset + done}: {error.strerror}") from None
        if count == 0:
            raise CheckpointError(f"{piece.path} is truncated: it ends at byte {piece.offset + done}, within tensor "
                                  f"{piece.name!r}; fetch the file again")
        done += count
