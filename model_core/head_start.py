"""What a start on a GPU needs that is not Python, while Python imports torch: two threads that hold no GIL.

The CUDA driver and the context of the first GPU: torch takes over what is there. And the hash of libtriton.so, 416 MB, which is
part of the name of every kernel in Triton's cache: 0.4 s (AMD EPYC), at the first launch otherwise.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_threads: list[threading.Thread] = []


def begin() -> bool:
    """Start, once per process. False, and nothing else happens, where there is no NVIDIA driver.

    Best before `import torch`, in a process that will use the GPU and does not fork afterwards. What goes wrong here goes wrong
    again where it is needed, and is said there.
    """
    if _threads:
        return True
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    _start("cuda-context", _begin_context, driver)
    with suppress(ImportError, AttributeError):
        from triton.runtime import cache  # in this thread: two that import modules of one another wait for each other

        _start("triton-key", cache.triton_key)
    return True


def wait() -> None:
    """Until all is done that was begun."""
    for thread in _threads:
        thread.join()


def _start(name: str, work: Callable[..., object], *args: Any) -> None:
    thread = threading.Thread(target=work, args=args, name=name, daemon=True)
    _threads.append(thread)
    thread.start()


def _begin_context(driver: ctypes.CDLL) -> None:
    """ctypes releases the GIL during each call. The context is kept: torch uses the same, the device's primary one."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), 0) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
