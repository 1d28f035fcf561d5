"""Several small arrays in one buffer, so that a step's inputs reach the device in one copy."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from model_core.engine.clock import MOST_AHEAD

_TORCH = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32, np.dtype(np.float32): torch.float32}
_NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT


class Copier:
    """Starts copies of pinned memory behind what the device's default stream has to do (`stream`, found once: see Span; None on
    a CPU). By the driver itself: torch's copy_ also notes the use of memory that is never freed here (with it, `send` took
    50 us of the host's time beside an H100)."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.default_stream(device) if device.type == "cuda" else None
        if self.stream is not None:
            self._start = ctypes.CDLL("libcuda.so.1").cuMemcpyHtoDAsync_v2
            self._start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
            self._handle = self.stream.cuda_stream

    def __call__(self, to: torch.Tensor, to_byte: int, host: torch.Tensor, byte: int, size: int) -> None:
        """`size` bytes; both tensors contiguous, places in bytes. Raises RuntimeError if the driver refuses."""
        if self.stream is None:
            into, source = to.view(-1).view(torch.uint8), host.view(-1).view(torch.uint8)
            into[to_byte : to_byte + size] = source[byte : byte + size]
            return
        copy = to.data_ptr() + to_byte, host.data_ptr() + byte, size, self._handle
        if (status := self._start(*copy)) == _NO_CONTEXT:  # the first call of this thread
            torch.cuda.set_device(self.stream.device)
            status = self._start(*copy)
        if status:
            raise RuntimeError(f"cuMemcpyHtoDAsync of {size} bytes failed: CUDA error {status}")


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
        self._copy = Copier(device)

    @property
    def host(self) -> dict[str, np.ndarray]:
        return self._views[self._turn]

    def turn(self) -> dict[str, np.ndarray]:
        self._turn = (self._turn + 1) % len(self._staging)
        if (copied := self._copied[self._turn]) is not None:
            copied.synchronize()
        return self.host

    def send(self, count: int | None = None) -> None:
        size = len(self._buffer) if count is None else self._last[0] + count * self._last[1]
        self.copy(self._buffer, 0, 0, size)
        self.sent()

    def copy(self, to: torch.Tensor, to_byte: int, byte: int, size: int) -> None:
        """Start a copy of `size` bytes of the host's to a place in another tensor. After all of them, `sent`."""
        self._copy(to, to_byte, self._staging[self._turn], byte, size)

    def sent(self) -> None:
        if (stream := self._copy.stream) is not None:
            event = self._copied[self._turn] = self._copied[self._turn] or torch.cuda.Event()
            event.record(stream)
