"""Threads of the CPU: work spread over them by items instead of inside each op, and who goes first."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def over_threads(work: Callable[[T], R], items: Iterable[T], workers: int | None = None) -> Iterator[R]:
    """work(item) for each item, in order, on `workers` threads (torch's thread count unless given).

    Each torch op inside runs on one thread. Ops of a millisecond that meet at an OpenMP barrier wait for whoever else
    has the core: with both of 2 cores busy, reading SmolLM2 took 31 s that way and under 1 s without barriers, and
    packing its linears 8 s and 3 s.
    """
    with _single_threaded_ops() as before, ThreadPoolExecutor(workers or before) as pool:
        yield from pool.map(work, items)


def yield_to_others() -> None:
    """Lower the priority of this thread, and of the OpenMP workers that it will start: who serves an engine on a CPU needs
    little of it, but soon."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)


@contextmanager
def _single_threaded_ops() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)
