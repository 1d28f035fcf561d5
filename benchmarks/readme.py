"""Write the measured tables of README.md from benchmarks/results/: no number there is typed by hand.

    python -m benchmarks.readme [--check]

A table stands between `<!-- results FILE: key=Title, key=Title, ... -->` and `<!-- end -->`; FILE is below
benchmarks/results/, each key one of its rows' keys. Under it stand the command, the machine and the date.
--check writes nothing and fails if a table is not what its file says.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
_TABLE = re.compile(r"(<!-- results (\S+): (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(text: str, results: Path) -> str:
    """The text with every table filled in. Raises KeyError for a key that the rows do not have."""

    def fill(match: re.Match[str]) -> str:
        report = json.loads((results / match[2]).read_text())
        columns = [column.split("=", 1) for column in re.split(r",\s*", match[3])]
        return match[1] + _table(report, columns) + match[4]

    return _TABLE.sub(fill, text)


def _table(report: dict[str, Any], columns: list[list[str]]) -> str:
    lines = ["| " + " | ".join(title for _, title in columns) + " |", "|" + "---|" * len(columns)]
    for row in report["rows"]:
        lines.append("| " + " | ".join(_cell(row[key]) for key, _ in columns) + " |")
    machine = report["machine"]
    where = f"{machine['gpu']}" if "gpu" in machine else f"{machine['cores']} cores of {machine['cpu']}"
    lines += ["", f"`{report['command']}`, {where}, {report['date'][:10]}, commit {report['commit']}.", ""]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    path = _ROOT / "README.md"
    before = path.read_text()
    after = render(before, _ROOT / "benchmarks" / "results")
    if options.check:
        return 0 if before == after else 1
    path.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
