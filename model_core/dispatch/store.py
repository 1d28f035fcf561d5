"""Where measurements are kept: one readable JSON file per GPU, driver, versions, kernels, model shape and batch sizes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout

from model_core import kernels
from model_core.dispatch.calibrate import calibrate, representatives
from model_core.dispatch.measured import CHOICES, Measured, label, tried
from model_core.model.decode import DecodeChain
from model_core.weights.progress import Progress

logger = logging.getLogger("mini_llm.dispatch")

Mode = Literal["auto", "again"]
_WAIT_S = 300.0  # for another replica that measures the same
_SHAPE = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "qkv_bias",
          "sliding_window")  # fmt: skip


def folder() -> Path:
    """$XDG_CACHE_HOME/mini-llm/dispatch, in ~/.cache if that is not set."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "mini-llm" / "dispatch"


def facts(chain: DecodeChain, buckets: list[int]) -> dict[str, Any]:
    """Everything that a measurement depends on."""
    config, dtype = chain.model.config, chain.model.dtype
    points = representatives(buckets)
    measured = {str(rows): {op: list(map(label, tried(config, op, rows, dtype))) for op in CHOICES} for rows in points}
    return {
        "machine": machine(chain.q.device),
        "versions": {"torch": torch.__version__, "triton": _triton_version(), "kernels": source_hash()},
        "model": {name: getattr(config, name) for name in _SHAPE},
        "dtype": str(dtype).removeprefix("torch."),
        "page_size": chain.kv.k[0].shape[1],
        "launches_chained": chain.pdl,
        "rows": buckets,
        "candidates": digest(measured)[:16],
    }


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def machine(device: torch.device) -> dict[str, Any]:
    """The device that measures; names of a CPU where it is none."""
    if device.type != "cuda":
        return {"gpu": platform.machine(), "multiprocessors": 0, "driver": "none"}
    properties = torch.cuda.get_device_properties(device)
    return {"gpu": properties.name, "multiprocessors": properties.multi_processor_count, "driver": _driver_version()}


def _driver_version() -> str:
    try:
        found = re.search(r"\b\d{3,}\.\d[\d.]*", Path("/proc/driver/nvidia/version").read_text())
        if found:
            return found[0]
    except OSError:
        pass
    return f"CUDA {getattr(torch._C, '_cuda_getDriverVersion', lambda: 'unknown')()}"


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)


def source_hash(root: Path | None = None) -> str:
    """Of every file of the kernels' source, names and contents."""
    root = Path(next(iter(kernels.__path__))) if root is None else root
    found = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def path_of(known: dict[str, Any]) -> Path:
    return folder() / f"{digest(known)[:24]}.json"


def save(known: dict[str, Any], measured: dict[int, Measured], seconds: float) -> None:
    """Write the file whole or not at all. A folder that cannot be written is said, and no error."""
    path = path_of(known)
    points = {found.rows: found for found in measured.values()}
    data = {
        "about": "What decode steps are made of, and why. Choices were made in this order, each beside the best of those "
        "before it; microseconds: of a whole step of so many layers, head and sampler with that candidate, measured by "
        "model_core/dispatch/calibrate.py. To measure again, delete this file, or start with calibration: again.",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 1),
        **known,
        "speaks_for": {str(bucket): found.rows for bucket, found in measured.items()},
        "measured": [points[rows].to_json() for rows in sorted(points)],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".json")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(_readable(data))
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        logger.warning("calibration is not kept, so the next start measures again: %s", error)


def _readable(data: dict[str, Any]) -> str:
    """JSON with a line per candidate."""
    text = json.dumps(data, indent=1)
    return re.sub(r'\{\s+("tiles": [^{}]*?)\s+\}', lambda one: "{" + re.sub(r"\s*\n\s*", " ", one[1]) + "}", text) + "\n"


def load(chain: DecodeChain, known: dict[str, Any]) -> dict[int, Measured] | None:
    """What was measured by an earlier run; None if there is no such file, or, with a warning, if it is damaged or not about
    this."""
    path = path_of(known)
    try:
        data = json.loads(path.read_text())
        for key, value in known.items():
            if data[key] != value:
                raise ValueError(f"{key} is {data[key]!r}, here it is {value!r}")
        config, dtype = chain.model.config, chain.model.dtype
        measured = [Measured.from_json(one, config, dtype) for one in data["measured"]]
        found = {one.rows: one for one in measured}
        return {bucket: found[data["speaks_for"][str(bucket)]] for bucket in known["rows"]}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        logger.warning("%s is not used, and measured again: %s: %s", path, type(error).__name__, error)
        return None


def measured_choices(chain: DecodeChain, buckets: list[int], mode: Mode, progress: Progress, *, workers: int | None = None,
                     measure: Callable[..., dict[int, Measured]] = calibrate,
                     before: Callable[[], object] = int) -> dict[int, Measured]:  # fmt: skip
    """From the file, or measured now and written to it. "again" measures in any case. before: called before anything is
    measured."""
    known = facts(chain, buckets)
    if mode == "auto" and (found := load(chain, known)) is not None:
        logger.info("calibration of %s", path_of(known))
        return found
    began = time.time()
    with _alone(path_of(known)):
        path = path_of(known)
        fresh = path.exists() and path.stat().st_mtime >= began  # by another replica, while this one waited
        if fresh and (found := load(chain, known)) is not None:
            return found
        before()
        began = time.time()
        found = measure(chain, buckets, progress, workers=workers)
        save(known, found, time.time() - began)
    return found


def _alone(path: Path) -> Any:
    """Replicas that start together on one machine: one measures, the others wait for its file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path.with_suffix(".lock")).acquire(timeout=_WAIT_S)
    except (OSError, Timeout):
        return nullcontext()
