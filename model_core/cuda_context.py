"""The CUDA driver's start, while Python still imports torch: it needs no Python, and torch takes over what is there."""

from __future__ import annotations

import ctypes
import sys
import threading


def begin() -> threading.Thread | None:
    """Initialise the driver and the context of the first GPU that this process sees, in a thread. None without a driver.

    To be called before `import torch`, in a process that will use the GPU and does not fork afterwards. What goes wrong
    here is left for torch to say.
    """
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    thread = threading.Thread(target=_begin, args=(driver,), name="cuda-context", daemon=True)
    thread.start()
    return thread


def _begin(driver: ctypes.CDLL) -> None:
    """ctypes releases the GIL during each call. The context is kept: torch uses the same, the device's primary one."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), 0) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
