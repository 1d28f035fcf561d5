"""A process that compiles Triton kernels for compile.py, without a GPU. It imports torch, Triton and the kernels, no more."""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

Target = tuple[str, int, int]  # backend, architecture (90 is compute capability 9.0), threads per warp


def twin(dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], offset: int) -> torch.Tensor:
    """Its data_ptr() is its offset in bytes: memory that is not there begins at 0."""
    extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if 0 not in shape else 0
    return torch.empty(offset + extent, dtype=dtype, device="meta").as_strided(shape, stride, offset)


class _Driver:
    """What Triton's compiler asks of a driver."""

    def __init__(self, target: Target) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget(*target)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def work(folder: str, number: int, workers: int) -> None:
    """The life of worker `number`: a batch per line of standard input."""
    torch.cuda.is_available = lambda: True  # type: ignore[method-assign]  # the kernels' modules ask whether Triton is of use
    claims, installed = _Claims(Path(folder)), False
    for line in sys.stdin:
        batch = int(line)
        target, jobs = pickle.loads((Path(folder) / f"{batch}.jobs").read_bytes())
        if not installed:
            claims.install(target)
            installed = True
        first = len(jobs) * number // workers  # everyone begins elsewhere
        for job in (*range(first, len(jobs)), *range(first)):
            claims.job, claims.wanted_by = job, f"{batch} {job}\n"
            try:
                jobs[job]()
            except Exception:  # the launch will fail likewise, and say so
                traceback.print_exc()
        done = Path(folder) / f"{batch}.{number}"
        written = done.with_suffix(f"{done.suffix}-")
        written.write_text("".join(f"{job} {claim}\n" for job, claim in sorted(claims.wants)))
        written.rename(done)  # whole when it is seen
        claims.wants.clear()


class _Claims:
    """Makes of every launch in this process a compilation, unless another worker has claimed that kernel."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parent = os.getppid()
        self.job, self.wanted_by = 0, ""
        self.wants: set[tuple[int, str]] = set()  # (job, name of the claim): kernels that others have claimed

    def _claim(self, kind: str, what: str) -> Path | None:
        path = self._folder / kind / hashlib.sha256(what.encode()).hexdigest()
        with suppress(FileExistsError), open(path, "x") as file:
            file.write(self.wanted_by)
            return path
        if kind == "claims":
            self.wants.add((self.job, path.name))
        return None

    def install(self, target: Target) -> None:
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction

        driver.set_active(_Driver(target))  # type: ignore[arg-type]
        run, compile_one = JITFunction.run, JITFunction._do_compile

        def launch(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            return run(function, *args, grid=grid, warmup=True, **options)

        def compile_claimed(function: Any, key: str, signature: Any, *args: Any) -> Any:
            if os.getppid() != self._parent:  # nobody is waiting
                os._exit(1)
            name = f"{function.module}.{function.__qualname__}"
            claim = self._claim("claims", f"{name} {key}")
            if claim is None:
                return None
            try:
                kernel = compile_one(function, key, signature, *args)
            except BaseException as error:
                claim.write_text(f"{self.wanted_by}{name}: {type(error).__name__}: {error}")
                raise
            claim.write_text(f"{self.wanted_by}ok")
            if target[0] == "cuda" and self._claim("launchers", f"{name} {signature}"):
                _build_launcher(kernel)
            return kernel

        JITFunction.run = launch  # type: ignore[method-assign]
        JITFunction._do_compile = compile_claimed  # type: ignore[method-assign]


def _build_launcher(kernel: Any) -> None:
    """The C function that passes a signature's arguments: half a second of gcc. It needs the driver's library, but no GPU."""
    try:
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(kernel.src, kernel.metadata)
    except Exception:
        traceback.print_exc()
