"""From the README's serve command to the first streamed token: where the seconds go.

    python -m benchmarks.startup [--rounds 2]            this checkout, weights there
    python -m benchmarks.startup --clone [--rounds 2]    a new one: git clone, uv sync, weights fetched
    python -m benchmarks.startup --engine FOLDER         the engine alone, a new process a round: benchmarks/engine_startup.py

`.venv/bin/serve run` with the repository's serve_config.yaml and ports of its own; HF_ENDPOINT points at a closed port, so
the fallback is served, and with --clone fetched from the package index. Meanwhile a client asks for a streamed chat
completion, again 50 ms after each refusal. --clone clones this checkout's last commit from disk; uv is installed, and its
cache holds the packages (a first round on a new machine downloads them).

The moments between are those of Ray's start lines and of our own log lines, read from the processes' files as they are written;
inside the engine they are the durations of its `start-up:` line; "ready" is when the request that was accepted was sent. Of
several rounds the one with the median total is shown (of two the quicker one), with each step's range over all. engine_ready_s:
from the start of the model replica's process to its engine being ready. Written to benchmarks/results/<device>/startup.json or
startup_clone.json.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import engine_startup
from benchmarks.report import write_report
from benchmarks.server import ROOT, Server, serving

_PERIOD_S = 0.05
_LIMIT_S = 900
_BAR = 40  # characters
_EIGHTHS = " ▏▎▍▌▋▊▉"
_BODY = json.dumps({"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 8,
                    "temperature": 0, "stream": True})  # fmt: skip
# What a step ends with, in the order of events.
_LINES = {
    "Python and Ray imported": re.compile(r"Running config file"),
    "Ray up": re.compile(r"Started a local Ray instance"),
    "Serve up": re.compile(r"Started Serve in namespace"),
    "application built, weight task started": re.compile(r"^!{20}"),  # that no hub answers
    "weights on disk": re.compile(r"^I serving .* from "),
    "memory": re.compile(r"^I memory: "),
    "start-up": re.compile(r"^I start-up: (.*)"),
    "engine ready": re.compile(r"^I model (\S+) ready in ([\d.]+) s"),
}
_COLOUR = re.compile(r"\x1b\[\d*m")


@dataclass
class Round:
    """Seconds of each step, in order; and of the model replica from its process' start to ready."""

    model: str = ""
    engine_ready_s: float = 0.0
    steps: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.steps.values())


class Watch:
    """Notes when each of _LINES appears first in the server's log or in the files its processes write, and who wrote it."""

    def __init__(self, server: Server) -> None:
        self.at: dict[str, float] = {}
        self.found: dict[str, re.Match[str]] = {}
        self.replica_started = 0.0
        self._server = server
        self._read: dict[Path, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """One last look at what is there."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            last = self._stop.wait(_PERIOD_S)
            now = time.time()
            for path in [*self._server.ray_dir.glob("ray/session_[0-9]*/logs/worker-*.err"), self._server.log]:
                with contextlib.suppress(OSError):
                    self._look(path, now)
            if last:
                return

    def _look(self, path: Path, now: float) -> None:
        with path.open("rb") as file:
            file.seek(self._read.get(path, 0))
            text = file.read()
        whole = text.rfind(b"\n") + 1
        self._read[path] = self._read.get(path, 0) + whole
        for line in text[:whole].decode(errors="replace").splitlines():
            for name, pattern in _LINES.items():
                if name not in self.at and (match := pattern.search(line)):
                    self.at[name], self.found[name] = now, match
                    print(f"{now - self._server.started:6.1f} s  {_COLOUR.sub('', line)[:110]}", file=sys.stderr)
                    if name == "memory":  # Ray names a worker's file after its process
                        self.replica_started = process_started(int(path.stem.rpartition("-")[2]))


def process_started(pid: int) -> float:
    """time.time() of a process' start."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return booted + ticks / os.sysconf("SC_CLK_TCK")


def ask_until_answered(server: Server) -> tuple[float, float]:
    """time.time() of sending the first request that is accepted, and of its first text."""
    seen = -1
    while time.time() < server.started + _LIMIT_S:
        if server.process.poll() is not None:
            raise RuntimeError(f"serve run ended:\n{server.tail()}")
        sent = time.time()
        status = first_text(server.port)
        now = time.time()
        if status != seen:
            seen = status
            print(f"{now - server.started:6.1f} s  a chat request gets {status or 'no answer'}", file=sys.stderr)
        if status == 200:
            return sent, now
        time.sleep(_PERIOD_S)
    raise RuntimeError(f"no answer after {_LIMIT_S} s:\n{server.tail()}")


def first_text(port: int) -> int:
    """Ask once; returns at the first text with 200, or with the status of a refusal; 0 for no answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        try:
            connection.request("POST", "/v1/chat/completions", _BODY, {"content-type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                return response.status
            for line in response:
                if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                    return 200
        except (OSError, http.client.HTTPException, KeyError, IndexError):
            pass
    return 0


def serve_until_first_token(root: Path) -> Round:
    """One start of the server in `root`, and its end."""
    with serving({}, command=(str(root / ".venv" / "bin" / "serve"), "run"), root=root, wait=False) as server:
        watch = Watch(server)
        try:
            ready, token = ask_until_answered(server)
        finally:
            watch.close()
        print(f"{token - server.started:6.1f} s  first token; stopping the server", file=sys.stderr)
    done = Round(watch.found["engine ready"][1], watch.at["engine ready"] - watch.replica_started)
    engine = [part.split() for part in watch.found["start-up"][1].split(", ")]
    durations = {f"engine: {' '.join(words[:-2])}": float(words[-2]) for words in engine}
    durations.pop("engine: imports", None)  # from the replica's start, which is an own step here
    at = watch.at
    loading = at["start-up"] - sum(durations.values())
    moments = {name: at[name] for name in list(_LINES)[: list(_LINES).index("memory")] if name in at}
    moments |= {"replica's process started": watch.replica_started, "Python, Ray and torch imported": loading}
    before = server.started
    for name, moment in moments.items():
        done.steps[name] = moment - before
        before = moment
    done.steps |= durations
    # a request that was under way when the last line was written may have been sent before
    done.steps |= {"ready (HTTP replica, proxy)": max(0.0, ready - at["start-up"]), "first token": token - ready}
    return done


@contextlib.contextmanager
def cloned() -> Iterator[tuple[Path, dict[str, float]]]:
    """A fresh clone with its environment, and the seconds both took; deleted afterwards."""
    with tempfile.TemporaryDirectory(prefix="mini-llm-clone-", ignore_cleanup_errors=True) as directory:
        root, seconds = Path(directory) / "Mini-LLM-Infra", {}
        environment = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT")}
        for name, command, folder in (
            ("git clone", ["git", "clone", "--quiet", str(ROOT), str(root)], ROOT),
            ("uv sync", ["uv", "sync", "--quiet"], root),
        ):
            began = time.perf_counter()
            subprocess.run(command, cwd=folder, env=environment, check=True, stdout=sys.stderr)
            seconds[name] = time.perf_counter() - began
            print(f"{name}: {seconds[name]:.1f} s", file=sys.stderr)
        yield root, seconds


def one_round(clone: bool) -> Round:
    if not clone:
        return serve_until_first_token(ROOT)
    with cloned() as (root, seconds):
        served = serve_until_first_token(root)
    served.steps = seconds | served.steps
    return served


def rows_of(rounds: list[Round], mode: str) -> list[dict[str, Any]]:
    shown = sorted(rounds, key=lambda one: one.total)[(len(rounds) - 1) // 2]
    rows, cumulative = [], 0.0
    for step, seconds in shown.steps.items():
        cumulative += seconds
        every = [one.steps.get(step, 0.0) for one in rounds]
        rows.append({
            "mode": mode, "model": shown.model, "rounds": len(rounds), "step": step, "seconds": round(seconds, 2),
            "seconds_min": round(min(every), 2), "seconds_max": round(max(every), 2), "cumulative_s": round(cumulative, 2),
            "engine_ready_s": round(shown.engine_ready_s, 2),
        })  # fmt: skip
    return rows


def print_waterfall(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    total = rows[-1]["cumulative_s"]
    table = Table(box=None, pad_edge=False)
    table.add_column("step", no_wrap=True)
    for title in ("s", "min to max", "sum"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column(f"0 to {total:.1f} s", no_wrap=True)
    for row in rows:
        begin = int(_BAR * (row["cumulative_s"] - row["seconds"]) / total)
        full, eighths = divmod(max(1, round(8 * _BAR * row["seconds"] / total)), 8)
        table.add_row(row["step"], f"{row['seconds']:.2f}", f"{row['seconds_min']:.2f} to {row['seconds_max']:.2f}",
                      f"{row['cumulative_s']:.1f}", " " * begin + "█" * full + _EIGHTHS[eighths])  # fmt: skip
    Console(width=128, highlight=False).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clone", action="store_true", help="start from nothing: git clone, uv sync, no weights")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    alone = parser.add_argument_group("with --engine")
    alone.add_argument("--engine", type=Path, metavar="FOLDER", help="a model folder")
    alone.add_argument("--settings", type=json.loads, default={}, metavar="JSON", help="of EngineConfig")
    alone.add_argument("--cache", type=Path, help="folder of caches to find and keep; by default a new one each time")
    alone.add_argument("--from-disk", action="store_true", help="drop the weights from the page cache before each round")
    alone.add_argument("--no-head-start", action="store_true", help="CUDA's context only after torch was imported")
    options = parser.parse_args()
    if options.engine is not None:
        engine_startup.run(options.engine, options.rounds, settings=options.settings, cache=options.cache,
                           from_disk=options.from_disk, early=not options.no_head_start, out=options.out)  # fmt: skip
        return
    rounds = []
    for number in range(options.rounds):
        print(f"round {number + 1}", file=sys.stderr)
        rounds.append(one_round(options.clone))
    rows = rows_of(rounds, "clone" if options.clone else "checkout")
    path = write_report("startup_clone" if options.clone else "startup", rows, out=options.out)
    print_waterfall(rows)
    print(f"model replica, process start to ready: {rows[0]['engine_ready_s']:.1f} s")
    print(path)


if __name__ == "__main__":
    main()
