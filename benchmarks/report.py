"""The result file of a benchmark: what was measured, on what, by which command, when, at which commit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("torch", "triton", "ray", "transformers", "numpy")


def write_report(benchmark: str, rows: list[dict[str, Any]], *, out: Path | None = None) -> Path:
    """Write benchmarks/results/<device>/<benchmark>.json (or `out`) and return its path.

    Format: {"machine", "versions", "command", "date", "commit", "rows"}; rows are the benchmark's own.
    """
    path = out or _ROOT / "benchmarks" / "results" / device_slug() / f"{benchmark}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": machine(),
        "versions": versions(),
        "command": command(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "rows": rows,
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


def p99(values: Iterable[float]) -> float:
    """The 99th percentile, one of the values: more than 99 % are no larger, so of up to 100 it is the largest."""
    ordered = sorted(values)
    return ordered[int(0.99 * len(ordered))]


def device_slug() -> str:
    """The folder of this machine's results: the GPU's name, e.g. h100-80gb, or cpu."""
    name = _gpu()
    return name.lower().replace("nvidia ", "").replace(" ", "-") if name else "cpu"


def machine() -> dict[str, Any]:
    """CPU model, cores this process may use, memory in GiB, GPU and driver."""
    facts: dict[str, Any] = {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0)), "memory_gib": _memory_gib()}
    if gpu := _gpu():
        facts |= {"gpu": gpu, "driver": _driver()}
    return facts


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def command() -> str:
    """The command line that gives these numbers, without where they were written to."""
    spec = sys.modules["__main__"].__spec__
    program = f"python -m {spec.name}" if spec else f"python {Path(sys.argv[0]).name}"
    typed = sys.argv[1:]
    if "--out" in typed:
        at = typed.index("--out")
        typed = typed[:at] + typed[at + 2 :]
    return " ".join([program, *typed])


def commit() -> str:
    """MINI_LLM_COMMIT if that is set (for copies of a checkout), else the checkout's commit, with "+" if files differ."""
    if given := os.environ.get("MINI_LLM_COMMIT"):
        return given
    try:
        head = _run("git", "rev-parse", "--short", "HEAD")
        return head + ("+" if _run("git", "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _run(*argv: str) -> str:
    return subprocess.run(argv, cwd=_ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _driver() -> str:
    try:
        return _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
