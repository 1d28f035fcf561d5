"""Compile Triton kernels before they are launched: many at once, in processes without a GPU.

A kernel takes a core a second or more, and a cold start needs a hundred. `compile_ahead` is given jobs that launch kernels just
as the engine does. Workers run every job on twins of its tensors that have no storage (device "meta": the same shape, strides,
dtype and alignment, which is all that kernels are specialised on), under a driver that knows the GPU's architecture and
nothing else, and compile what no other worker has claimed. The result lies in Triton's cache on disk, where this process
finds it at its own first launch.

Nothing depends on it: what goes wrong here is logged, and a kernel that was not compiled ahead compiles when it is launched.
Workers are plain child processes, not multiprocessing's, which would run the caller's `__main__` once more and are refused to
daemons. They stay for the next batch until `release`, or until this process ends.
"""

from __future__ import annotations

import atexit
import hashlib
import io
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from model_core.dispatch import compile_worker
from model_core.dispatch.compile_worker import Target
from model_core.weights.progress import Progress

logger = logging.getLogger("mini_llm.dispatch")

Job = Callable[[], object]  # picklable: a functools.partial of something importable

MOST_WORKERS = 16
WORKER_BYTES = 400 << 20  # memory of one worker, beside the libraries they share
_POLL_S = 0.05

_lock = threading.Lock()
_pool: _Pool | None = None


def compile_ahead(
    jobs: Sequence[Job], workers: int | None = None, *, progress: Progress | None = None, stamp: str | None = None,
    target: Target | None = None, timeout_s: float = 240.0,
) -> dict[int, str]:  # fmt: skip
    """Compile all kernels that `jobs` launch. Returns {index of a job: reason} for every job with a kernel that took its
    compiler down, now or in an earlier batch, which had better not be tried again; other failures are left to the launch.

    workers: processes, by default one per core. stamp: a name for everything that the jobs depend on; with it, jobs that were
    compiled once cost nothing more for as long as Triton's cache keeps them. target: by default this process's GPU.
    progress: advanced by one per kernel. timeout_s: seconds after which the rest is given up.
    """
    count = min(MOST_WORKERS, cores() if workers is None else workers, len(jobs))
    if count < 2:  # a worker alone is no faster than this process
        return {}
    try:
        done = None if stamp is None else _cache_folder() / f"mini-llm-{hashlib.sha256(stamp.encode()).hexdigest()[:32]}"
        if done is not None and done.exists():
            return {}
        with _one_process(done, timeout_s), _lock:
            if done is not None and done.exists():  # another replica compiled them meanwhile
                return {}
            died = _open(count, target or _target()).run(jobs, time.monotonic() + timeout_s, progress)
            if died is None:
                release(locked=True)
            elif done is not None:
                done.touch()
        return died or {}
    except Exception as error:  # whatever it is, launches compile their kernels themselves
        logger.warning("kernels are not compiled ahead, which is only slower: %s: %s", type(error).__name__, error)
        release()
        return {}


def release(*, locked: bool = False) -> None:
    """End the workers, if there are any."""
    global _pool
    with nullcontext() if locked else _lock:
        if _pool is not None:
            _pool.close()
            _pool = None


atexit.register(release)


def _open(workers: int, target: Target) -> _Pool:
    global _pool
    if _pool is not None and (_pool.target != target or not _pool.alive):
        release(locked=True)
    if _pool is None:
        _pool = _Pool(workers, target)
    return _pool


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _target() -> Target:
    from triton.runtime import driver

    found = driver.active.get_current_target()
    return found.backend, found.arch, found.warp_size


def _cache_folder() -> Path:
    from triton import knobs

    folder = Path(knobs.cache.dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _one_process(done: Path | None, timeout_s: float) -> Any:
    """Replicas that start together on one machine do not all compile the same."""
    from filelock import FileLock

    return nullcontext() if done is None else FileLock(f"{done}.lock", timeout=timeout_s)


class _Pool:
    """Workers, and the folder through which they are told and tell: `<batch>.jobs`, a claim per kernel (which job wanted it;
    then "ok" or what went wrong), `<batch>.<worker>` where a worker is through with a batch (which jobs want which claims of
    others), and what they print."""

    def __init__(self, workers: int, target: Target) -> None:
        self.target = target
        self.folder = Path(tempfile.mkdtemp(prefix="mini-llm-compile-"))
        for name in ("claims", "launchers"):
            (self.folder / name).mkdir()
        self._batch = -1
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        env = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1",
               "PYTHONSAFEPATH": "1"}  # fmt: skip
        self._workers: list[subprocess.Popen[bytes]] = []
        try:
            for number in range(workers):
                call = f"work({str(self.folder)!r}, {number}, {workers})"
                command = [sys.executable, "-c", f"from {compile_worker.__name__} import work; {call}"]
                with open(self.folder / f"log.{number}", "wb") as log:
                    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=env)
                self._workers.append(worker)
        except BaseException:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        return any(worker.poll() is None for worker in self._workers)

    def run(self, jobs: Sequence[Job], deadline: float, progress: Progress | None) -> dict[int, str] | None:
        """{job: reason} of the kernels that ended their compiler; None if the workers are of no more use."""
        self._batch += 1
        text = io.BytesIO()
        _Pickler(text, protocol=pickle.HIGHEST_PROTOCOL).dump((self.target, list(jobs)))
        (self.folder / f"{self._batch}.jobs").write_bytes(text.getvalue())
        for worker in self._workers:
            assert worker.stdin is not None
            with suppress(BrokenPipeError):
                worker.stdin.write(f"{self._batch}\n".encode())
                worker.stdin.flush()
        before = seen = len(os.listdir(self.folder / "claims"))
        while True:
            busy = any(worker.poll() is None and not (self.folder / f"{self._batch}.{number}").exists()
                       for number, worker in enumerate(self._workers))  # fmt: skip
            now = len(os.listdir(self.folder / "claims"))
            if progress is not None and now > seen:
                progress.advance(now - seen)
            seen = now
            if not busy:
                break
            if time.monotonic() > deadline:
                logger.warning("compiling ahead takes too long: %d kernels were begun, the rest is given up", seen - before)
                return None
            time.sleep(_POLL_S)
        if not any((self.folder / f"{self._batch}.{number}").exists() for number in range(len(self._workers))):
            logger.warning("the processes that compile ahead have ended, launches compile instead: %s", self._last_words())
            return None if seen == before else self._died()
        return self._died()

    def _died(self) -> dict[int, str]:
        found, crashed = set(), set()
        for claim in (self.folder / "claims").iterdir():
            batch, job, *result = claim.read_text().split(maxsplit=2) or ["", ""]
            if batch and not result:
                crashed.add(claim.name)
                found |= {int(job)} if batch == str(self._batch) else set()
            elif batch == str(self._batch) and result != ["ok"]:
                logger.info("a kernel was not compiled ahead: %s", " ".join(result))
        for wants in self.folder.glob(f"{self._batch}.*[0-9]") if crashed else ():
            for line in wants.read_text().splitlines():
                job, claim_name = line.split()
                found |= {int(job)} if claim_name in crashed else set()
        return dict.fromkeys(sorted(found), "its compiler crashed")

    def _last_words(self) -> str:
        for log in self.folder.glob("log.*"):
            if lines := log.read_text(errors="replace").strip().splitlines():
                return lines[-1]
        return "nothing"

    def close(self) -> None:
        for worker in self._workers:
            assert worker.stdin is not None
            with suppress(OSError):
                worker.stdin.close()
        for worker in self._workers:
            worker.kill()
            worker.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class _Pickler(pickle.Pickler):
    """Tensors become twins without storage; everything else is itself."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            offset = value.data_ptr() % 16 // value.element_size()
            return compile_worker.twin, (value.dtype, tuple(value.shape), value.stride(), offset)
        return NotImplemented
