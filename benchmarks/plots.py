"""Charts of the benchmarks: PNGs beside their JSON, legible at the width of a README.

matplotlib belongs to the dev group and is imported when a chart is drawn. Without it the numbers are there, the chart is not,
and one line on stderr says so.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_COLOURS = ("#1f6feb", "#d1591c", "#2da44e", "#8250df", "#bf3989", "#6e7781")
_GREY = "#57606a"
_INCHES = (8.4, 4.4)  # at _DPI twice a README's width, so that it is sharp on dense displays too
_DPI = 200
_STYLE: dict[Any, Any] = {
    "font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": _GREY, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": "#d8dee4", "grid.linewidth": 0.7, "legend.frameon": False, "lines.linewidth": 2.2,
    "xtick.color": _GREY, "ytick.color": _GREY,
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One curve. low and high: the ends of a band around it, e.g. the fastest and slowest round."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dashed: bool = False


@dataclass(frozen=True)
class Limit:
    """A horizontal line that nothing can cross, e.g. what the memory's bandwidth allows."""

    label: str
    y: float


@dataclass(frozen=True)
class Bars:
    """One bar per group, all of one colour. None leaves its place empty."""

    label: str
    values: Sequence[float | None]


def draw_lines(report: Path, lines: Sequence[Line], *, title: str, x_label: str, y_label: str, log_x: bool = False,
               log_y: bool = False, x_ticks: Sequence[float] | None = None, limit: Limit | None = None, marks: bool = True,
               out: Path | None = None) -> Path | None:  # fmt: skip
    """Curves over x. Labels carry units: "new tokens", "time (s)". marks: a dot at each point, for curves of few.

    report: the JSON that write_report wrote; the chart names its machine and date and goes to `out`, or beside it under its
    name. Returns where, or None without matplotlib.
    """

    def fill(axes: Any) -> None:
        for line, colour in zip(lines, _COLOURS, strict=False):
            axes.plot(line.x, line.y, label=line.label, color=colour, linestyle="--" if line.dashed else "-",
                      marker="o" if marks else None, markersize=5)  # fmt: skip
            if line.low is not None and line.high is not None:
                axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
        if log_x:
            axes.set_xscale("log", base=2)
        if log_y:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        _plain_numbers(axes.xaxis, log_x)
        _plain_numbers(axes.yaxis, log_y)
        if x_ticks is not None:
            axes.set_xticks(x_ticks, [f"{tick:g}" for tick in x_ticks])
            axes.set_xticks([], minor=True)
        if limit is not None:
            _add_limit(axes, limit)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if len(lines) > 1 or limit is not None:
            axes.legend()

    return _draw(report, fill, title, out)


def draw_bars(report: Path, groups: Sequence[str], bars: Sequence[Bars], *, title: str, y_label: str,
              limit: Limit | None = None, out: Path | None = None) -> Path | None:  # fmt: skip
    """Bars side by side in each of `groups`, with their values on top. Otherwise as draw_lines."""

    def fill(axes: Any) -> None:
        width = 0.8 / len(bars)
        for number, (bar, colour) in enumerate(zip(bars, _COLOURS, strict=False)):
            present = [(place, value) for place, value in enumerate(bar.values) if value is not None]
            drawn = axes.bar([place + (number - (len(bars) - 1) / 2) * width for place, _ in present],
                             [value for _, value in present], 0.94 * width, label=bar.label, color=colour)  # fmt: skip
            axes.bar_label(drawn, [_number(value) for _, value in present], padding=2, fontsize=10)
        if limit is not None:
            _add_limit(axes, limit)
        axes.grid(visible=False, axis="x")
        axes.set_xticks(range(len(groups)), groups)
        axes.set_ylabel(y_label)
        axes.margins(y=0.12)
        _plain_numbers(axes.yaxis, False)
        if len(bars) > 1 or limit is not None:
            axes.legend()

    return _draw(report, fill, title, out)


def where_and_when(report: dict[str, Any]) -> str:
    """A chart's second line: machine, date and commit of a report."""
    machine = report["machine"]
    cores = f"{machine['cores']} core{'s' if machine['cores'] > 1 else ''} of {machine['cpu']}"
    return f"{machine.get('gpu', cores)}, {report['date'][:10]}, commit {report['commit']}"


def _draw(report: Path, fill: Callable[[Any], None], title: str, out: Path | None) -> Path | None:
    path = out or report.with_suffix(".png")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no chart {path.name}: matplotlib is not installed (uv sync installs it)", file=sys.stderr)
        return None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(_INCHES, dpi=_DPI, layout="constrained")
        axes = figure.add_subplot()
        fill(axes)
        axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=24)
        axes.text(0, 1.03, where_and_when(json.loads(report.read_text())), transform=axes.transAxes, fontsize=9.5, color=_GREY)
        part = path.with_name(f".{path.name}")
        figure.savefig(part, format="png", metadata={"Software": None})
    os.replace(part, path)
    return path


def _add_limit(axes: Any, limit: Limit) -> None:
    axes.axhline(limit.y, color=_GREY, linewidth=1.4, linestyle=(0, (5, 3)), label=limit.label)
    if axes.get_ylim()[1] < 1.05 * limit.y:
        axes.set_ylim(top=1.08 * limit.y)


def _plain_numbers(axis: Any, logarithmic: bool) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    if logarithmic:
        axis.set_minor_formatter(NullFormatter())


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
