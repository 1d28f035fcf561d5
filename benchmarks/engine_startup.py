"""`python -m benchmarks.startup --engine FOLDER`: from a process's start to its engine being ready, and to a first token.

Each round is a new process (benchmarks/first_token.py). All share a folder of caches, empty before the first round unless
--cache names one: Triton's kernels, the calibration, and Python's bytecode, which is written there whatever the environment
says. Rounds that find all that are "warm". The weights' files are read before each round, so that they are in the page cache;
with --from-disk they are dropped from it instead. ready_s and first_token_s count from the call that starts the process.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import write_report
from model_core.engine.startup import Step, waterfall

_ROOT = Path(__file__).resolve().parents[1]
_WEIGHTS = (".safetensors", ".gguf")


@dataclass
class Round:
    """One process. Steps count from its start, as the kernel says it; ready_s and first_token_s from the call before."""

    warm: bool
    ready_s: float
    first_token_s: float
    device: str
    steps: list[Step]


def run(folder: Path, rounds: int, *, settings: dict[str, Any], cache: Path | None, from_disk: bool, early: bool,
        out: Path | None) -> None:  # fmt: skip
    """Measure, print and write benchmarks/results/<device>/startup_engine.json."""
    found = []
    with tempfile.TemporaryDirectory(prefix="mini-llm-startup-") if cache is None else nullcontext(cache) as caches:
        for number in range(rounds):
            (drop_from_page_cache if from_disk else read)(folder)
            found.append(one_round(folder, Path(caches), settings, early))
            print(f"round {number + 1}, {_name(found[-1])}: ready {found[-1].ready_s:.2f} s, "
                  f"first token {found[-1].first_token_s:.2f} s after the process was started", file=sys.stderr)  # fmt: skip
    rows = [row for number, one in enumerate(found, 1) for row in rows_of(one, number, folder.name, from_disk)]
    path = write_report("startup_engine", rows, out=out)
    for number, one in enumerate(found, 1):
        print(f"round {number}, {_name(one)}")
        print("\n".join(f"  {line}" for line in waterfall(one.steps)))
    for warm in (False, True):
        ready = [one.ready_s for one in found if one.warm == warm]
        if ready:
            print(f"{'warm' if warm else 'cold'} caches: ready {statistics.median(ready):.2f} s "
                  f"({min(ready):.2f} to {max(ready):.2f} in {len(ready)})")  # fmt: skip
    print(path)


def one_round(folder: Path, caches: Path, settings: dict[str, Any], early: bool) -> Round:
    warm = (caches / "bytecode").is_dir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"TRITON_CACHE_DIR": str(caches / "triton"), "XDG_CACHE_HOME": str(caches / "calibration"),
                    "PYTHONPYCACHEPREFIX": str(caches / "bytecode")}  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.first_token", str(folder.resolve()), json.dumps(settings), str(int(early))]
    began = time.time()
    output = subprocess.run(command, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    answer = json.loads(output.splitlines()[-1])
    steps = [Step(*step) for step in answer["steps"]]
    steps.append(Step("first token", steps[-1].ended, steps[-1].ended + answer["token"] - answer["ready"]))
    return Round(warm, answer["ready"] - began, answer["token"] - began, answer["device"], steps)


def rows_of(one: Round, number: int, model: str, from_disk: bool) -> list[dict[str, Any]]:
    """A row per step; they overlap."""
    return [
        {
            "model": model, "device": one.device, "round": number, "caches": "warm" if one.warm else "cold",
            "weights_from": "disk" if from_disk else "page cache", "ready_s": round(one.ready_s, 2),
            "first_token_s": round(one.first_token_s, 2), "step": step.name, "began_s": round(step.began, 3),
            "ended_s": round(step.ended, 3), "seconds": round(step.ended - step.began, 3), "note": step.note,
        }
        for step in one.steps
    ]  # fmt: skip


def read(folder: Path) -> None:
    """The weights into the page cache."""
    for path in _files(folder):
        with path.open("rb", buffering=0) as file:
            while file.read(64 << 20):
                pass


def drop_from_page_cache(folder: Path) -> None:
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # pages that were not written yet cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix in _WEIGHTS]


def _name(one: Round) -> str:
    return f"{'warm' if one.warm else 'cold'} caches, {one.device}"
