"""The tests of kernels, engine, dispatch and model on this machine: how many passed, failed and were skipped, by file.

    python -m benchmarks.checks [--tests tests/kernels tests/engine tests/dispatch tests/model] [--jobs N] [--out FILE]

CI runs them without a GPU, kernels in Triton's interpreter; on a machine with one they are compiled, and compared with their
float32 references there. Several processes take pieces of at most `PIECE` tests. Ends with status 1 if any test failed, with
their names and messages. Written to benchmarks/results/<device>/checks.json.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.report import write_report
from benchmarks.server import ROOT

PIECE = 30  # tests; most of their time is compilation, which pieces share by Triton's cache
_PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")


def collect(tests: Sequence[str]) -> list[str]:
    """Names of tests, in their order. Raises RuntimeError with pytest's words."""
    found = subprocess.run([*_PYTEST, "--collect-only", *tests], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(found.stdout + found.stderr)
    return [line for line in found.stdout.splitlines() if "::" in line]


def pieces(names: Sequence[str]) -> Iterator[list[str]]:
    for _, group in groupby(names, key=file_of):
        of_file = [*group]
        yield from (of_file[at : at + PIECE] for at in range(0, len(of_file), PIECE))


def file_of(name: str) -> str:
    return name.partition("::")[0]


def run(names: list[str]) -> dict[str, Any]:
    """One process' tests, all of one file. lost: those that it did not live to tell of."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tests.xml"
        began = time.monotonic()
        said = subprocess.run([*_PYTEST, f"--junitxml={path}", *names], cwd=ROOT, capture_output=True, text=True)
        seconds = time.monotonic() - began
        suite = next(ElementTree.parse(path).iter("testsuite")).attrib if path.exists() else {}
    told, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    if failed or told < len(names):
        print(said.stdout[-6000:] + said.stderr[-2000:], file=sys.stderr, flush=True)
    return {"file": file_of(names[0]), "passed": told - failed - skipped, "failed": failed, "skipped": skipped,
            "lost": max(0, len(names) - told), "seconds": seconds}  # fmt: skip


def summed(runs: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each file, and one for all. seconds: of all its processes together."""
    files = [(file, [*group]) for file, group in groupby(runs, key=lambda one: one["file"])]
    for file, group in [*files, ("all", runs)]:
        counts = {what: sum(one[what] for one in group) for what in ("passed", "failed", "skipped", "lost")}
        yield {"file": file, **counts, "seconds": round(sum(one["seconds"] for one in group), 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", nargs="+", default=["tests/kernels", "tests/engine", "tests/dispatch", "tests/model"])
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="processes at once")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    parts, runs = [*pieces(collect(options.tests))], list[dict[str, Any]]()
    with ThreadPoolExecutor(options.jobs) as pool:
        for one in pool.map(run, parts):
            runs.append(one)
            print("{file}: {passed} passed, {failed} failed, {skipped} skipped, {seconds:.0f} s".format(**one),
                  f"({len(runs)} of {len(parts)})", file=sys.stderr, flush=True)  # fmt: skip
    rows = [*summed(runs)]
    print(rows[-1])
    print(write_report("checks", rows, out=options.out))
    return int(rows[-1]["failed"] + rows[-1]["lost"] > 0)


if __name__ == "__main__":
    sys.exit(main())
