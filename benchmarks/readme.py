"""Write the measured tables and charts of README.md from benchmarks/results/: no number there is typed by hand.

    python -m benchmarks.readme [--check]

What stands between one of these marks and `<!-- end -->` is replaced; FILE is below benchmarks/results/:

    <!-- results FILE: key=Title, key=Title, ... -->                        all rows of a result file
    <!-- results FILE where key=value|value key=value: key%=Title, ... -->  those of its rows, e.g. batch=1|32|256
    <!-- results? FILE "Text": key=Title, ... -->                           text and table; nothing while there is no such file
    <!-- chart FILE: What it shows -->                                      an image, and what is read where it is not seen

Each key is one of the rows'; with % a share of 1 becomes a percentage. Under a table stand the command, the machine and the
date; a chart has them in it. --check writes nothing and fails if README.md is not what the files say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
_TABLE = re.compile(r'(<!-- results(\??) (\S+)(?: where ([^:"]*?))?(?: "(.*?)")?: (.*?) -->\n).*?(<!-- end -->)', re.DOTALL)
_CHART = re.compile(r"(<!-- chart (\S+): (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(text: str, results: Path, folder: str = "benchmarks/results") -> str:
    """The text with every table and chart filled in; `folder` is where `results` is for who reads the text.

    Raises FileNotFoundError for a file that is not there, KeyError for a column that the rows do not have, ValueError for a
    table without rows.
    """

    def table(match: re.Match[str]) -> str:
        mark, optional, file, where, text, wanted, end = match.groups()
        if optional and not (results / file).is_file():
            return mark + end
        report = json.loads((results / file).read_text())
        conditions = [condition.split("=", 1) for condition in (where or "").split()]
        columns = [column.split("=", 1) for column in re.split(r",\s*", wanted)]
        rows = [row for row in report["rows"] if all(str(row.get(key)) in allowed.split("|") for key, allowed in conditions)]
        if not rows:
            raise ValueError(f"{file} has no row where {where}")
        for key, _ in columns:  # which some of the rows may lack
            if not any(key.removesuffix("%") in row for row in rows):
                raise ValueError(f"{file} has no {key}")
        return mark + (f"{text}\n\n" if text else "") + _table(report, rows, columns) + end

    def chart(match: re.Match[str]) -> str:
        if not (results / match[2]).is_file():
            raise FileNotFoundError(results / match[2])
        return f"{match[1]}![{match[3]}]({folder}/{match[2]})\n{match[4]}"

    return _CHART.sub(chart, _TABLE.sub(table, text))


def _table(report: dict[str, Any], rows: list[dict[str, Any]], columns: list[list[str]]) -> str:
    lines = ["| " + " | ".join(title for _, title in columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(_column(row, key) for key, _ in columns) + " |")
    machine = report["machine"]
    where = f"{machine['gpu']}" if "gpu" in machine else f"{machine['cores']} cores of {machine['cpu']}"
    lines += ["", f"`{report['command']}`, {where}, {report['date'][:10]}, commit {report['commit']}.", ""]
    return "\n".join(lines)


def _column(row: dict[str, Any], key: str) -> str:
    if key.endswith("%"):
        share = row.get(key[:-1])
        return "" if share is None else f"{100 * share:.0f} %"
    return _cell(row.get(key))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    path = _ROOT / "README.md"
    before = path.read_text()
    try:
        after = render(before, _ROOT / "benchmarks" / "results")
    except FileNotFoundError as error:
        sys.exit(f"README.md shows a result that is not there: {error}")
    if options.check:
        return 0 if before == after else 1
    path.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
