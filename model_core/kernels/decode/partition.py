"""How much of a multiprocessor's memory is shared memory while the kernels of a decode step run.

Each multiprocessor divides its memory into shared memory and L1 cache, by the wish of the kernel that runs on it, and changes
the division only when it is empty. Kernels of a chain whose wishes differ therefore do not overlap, whatever their launches
say (CUDA C++ Programming Guide, "Shared Memory" of compute capability 9.0). With one wish for all kernels of a step they do:
32 rows of TinyLlama took 1,379 us a step at a quarter instead of 1,582 by the driver's choice for each (H100).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from model_core.kernels.runtime import INTERPRETED, triton

DRIVERS_CHOICE = -1
_PREFERRED_CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT

_loaded: list[int] = []  # handles (CUfunction) of the Triton kernels that this process has loaded


def _note(module: Any, function: int, *_: Any) -> None:
    _loaded.append(function)


if triton is not None and not INTERPRETED and torch.cuda.is_available():
    triton.knobs.runtime.kernel_load_end_hook = _note


@contextmanager
def prefer_shared(percent: int) -> Iterator[None]:
    """Kernels that are captured meanwhile, and were loaded before, want `percent` of a multiprocessor's memory as shared memory
    (from 0 to 100; DRIVERS_CHOICE is each one's own). It is a wish: who needs more gets more."""
    assert -1 <= percent <= 100
    if percent == DRIVERS_CHOICE or not _loaded:
        yield
        return
    _wish(percent)
    try:
        yield
    finally:
        _wish(DRIVERS_CHOICE)


def _wish(percent: int) -> None:
    driver = ctypes.CDLL("libcuda.so.1")
    for function in _loaded:
        driver.cuFuncSetAttribute(ctypes.c_void_p(function), _PREFERRED_CARVEOUT, percent)
