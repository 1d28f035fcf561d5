"""Several small arrays in one buffer, so that a step's inputs reach the device in one copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from model_core.engine.clock import MOST_AHEAD

_TORCH = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32, np.dtype(np.float32): torch.float32}


class Packed:
    """Named arrays, the same on the host (`host[name]`, pinned) and on the device (`device[name]`).

    `turn` begins a step: `host` are then arrays that no copy in flight reads; it waits for one where it must. `send` starts
    the copy of them all, or of the last one's first `count` elements and all others. copies: host buffers, used in turn; with
    fewer than there are steps in flight the host waits for copies behind a running step.
    """

    def __init__(self, fields: Sequence[tuple[str, int, str]], device: torch.device, copies: int = MOST_AHEAD + 1) -> None:
        places, size = [], 0
        for name, count, kind in fields:
            size = -(-size // 8) * 8  # int64 views need it
            places.append((name, count, np.dtype(kind), size))
            size += count * np.dtype(kind).itemsize
        self._last = places[-1][3], places[-1][2].itemsize  # where the last one begins, and the bytes of an element
        self._buffer = torch.zeros(max(8, size), dtype=torch.uint8, device=device)
        self.device = {name: self._buffer[at : at + count * kind.itemsize].view(_TORCH[kind])
                       for name, count, kind, at in places}  # fmt: skip
        self._staging = [torch.zeros(max(8, size), dtype=torch.uint8, pin_memory=device.type == "cuda") for _ in range(copies)]
        self._views = [{name: buffer.numpy()[at : at + count * kind.itemsize].view(kind)
                        for name, count, kind, at in places} for buffer in self._staging]  # fmt: skip
        self._copied: list[torch.cuda.Event | None] = [None] * copies
        self._turn = 0
        if device.type == "cuda":
            self._stream = torch.cuda.default_stream(device)  # found once: see Span

    @property
    def host(self) -> dict[str, np.ndarray]:
        return self._views[self._turn]

    def turn(self) -> dict[str, np.ndarray]:
        self._turn = (self._turn + 1) % len(self._staging)
        if (copied := self._copied[self._turn]) is not None:
            copied.synchronize()
        return self.host

    def send(self, count: int | None = None) -> None:
        size = None if count is None else self._last[0] + count * self._last[1]
        self._buffer[:size].copy_(self._staging[self._turn][:size], non_blocking=True)
        if self._buffer.device.type == "cuda":
            event = self._copied[self._turn] = self._copied[self._turn] or torch.cuda.Event()
            event.record(self._stream)
