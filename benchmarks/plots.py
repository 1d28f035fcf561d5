"""Charts of the benchmarks: PNGs beside their JSON, legible at the width of a README.

matplotlib belongs to the dev group and is imported when a chart is drawn. Without it the numbers are there, the chart is not,
and one line on stderr says so.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLOURS = ("#1f6feb", "#d1591c", "#2da44e", "#8250df", "#bf3989", "#6e7781", "#bf8700", "#1b7c83")
PALE = "#d0d7de"  # for what is no part of its own, e.g. the rest of a whole
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
    """One curve. low and high: the ends of a band around it, e.g. the fastest and slowest round. colour: of COLOURS, by the
    line's place in the list where it is None."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dashed: bool = False
    colour: str | None = None


@dataclass(frozen=True)
class Panel:
    """One of several small charts of the same lines."""

    title: str
    lines: Sequence[Line]


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
    colour: str | None = None


def draw_lines(report: Path, lines: Sequence[Line], *, title: str, x_label: str, y_label: str) -> Path | None:
    """Curves over x, of so many points that none is marked. Labels carry units: "new tokens", "time (s)".

    report: the JSON that write_report wrote; the chart names its machine and date and lies beside it under its name. Returns
    where, or None without matplotlib.
    """

    def fill(axes: Any) -> None:
        _add_lines(axes, lines)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _plain_numbers(axes.xaxis)
        if len(lines) > 1:
            axes.legend()

    return _draw(report, [fill], title, None)


def draw_panels(report: Path, panels: Sequence[Panel], *, title: str, x_label: str, y_label: str, x_ticks: Sequence[float],
                limit: Limit | None = None, out: Path | None = None) -> Path | None:  # fmt: skip
    """Panels side by side with one y axis and one legend, that of the first; x is logarithmic, with labels at those of
    `x_ticks` that have room. The chart goes to `out` if given. Otherwise as draw_lines."""

    def fill(axes: Any, panel: Panel) -> None:
        _add_lines(axes, panel.lines, marker="o")
        if limit is not None:
            axes.axhline(limit.y, color=_GREY, linewidth=1.4, linestyle=(0, (5, 3)), label=limit.label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(x_ticks, [_number(tick) for tick in x_ticks])
        axes.set_xlabel(x_label)
        axes.set_title(panel.title, fontsize=11, fontweight="bold", color=_GREY)
        if panel is panels[0]:
            axes.set_ylabel(y_label)
            handles, labels = axes.get_legend_handles_labels()
            axes.figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), fontsize=10,
                               handlelength=3)  # fmt: skip

    return _draw(report, [lambda axes, panel=panel: fill(axes, panel) for panel in panels], title, out)  # type: ignore[misc]


def draw_stacks(report: Path, groups: Sequence[str], parts: Sequence[Bars], *, title: str, x_label: str, y_label: str,
                totals: Sequence[str], limits: Sequence[float] = (), limit_label: str = "",
                out: Path | None = None) -> Path | None:  # fmt: skip
    """One bar per group, made of `parts` from below, `totals` written on top. limits: a mark across each bar."""

    def fill(axes: Any) -> None:
        base = [0.0] * len(groups)
        for part, colour in zip(parts, itertools.cycle(COLOURS), strict=False):
            values = [value or 0.0 for value in part.values]
            axes.bar(range(len(groups)), values, 0.7, base, label=part.label, color=part.colour or colour)
            base = [low + value for low, value in zip(base, values, strict=True)]
        for place, (top, total) in enumerate(zip(base, totals, strict=True)):
            axes.annotate(total, (place, top), (0, 3), textcoords="offset points", ha="center", fontsize=10)
        for place, limit in enumerate(limits):
            axes.hlines(limit, place - 0.42, place + 0.42, color="#1f2328", linewidth=2, label=None if place else limit_label)
        axes.grid(visible=False, axis="x")
        axes.set_xticks(range(len(groups)), groups)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.margins(y=0.1)
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.0, 1.0))

    return _draw(report, [fill], title, out)


def where_and_when(report: dict[str, Any]) -> str:
    """A chart's second line: machine, date and commit of a report."""
    machine = report["machine"]
    cores = f"{machine['cores']} core{'s' if machine['cores'] > 1 else ''} of {machine['cpu']}"
    return f"{machine.get('gpu', cores)}, {report['date'][:10]}, commit {report['commit']}"


def _draw(report: Path, fills: Sequence[Callable[[Any], None]], title: str, out: Path | None) -> Path | None:
    """One chart per function, side by side."""
    path = out or report.with_suffix(".png")
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        print(f"no chart {path.name}: matplotlib is not installed (uv sync installs it)", file=sys.stderr)
        return None
    with matplotlib.rc_context(_STYLE):
        # The title has its room above all charts: as that of the first, a long one would push the second away.
        figure = Figure(_INCHES, dpi=_DPI, layout=ConstrainedLayoutEngine(rect=(0, 0, 1, 0.87), w_pad=0.1))
        figure.text(0.012, 0.98, title, va="top", fontsize=12, fontweight="bold")
        figure.text(0.012, 0.92, where_and_when(json.loads(report.read_text())), va="top", fontsize=9, color=_GREY)
        row = figure.subplots(1, len(fills), sharey=True, squeeze=False)[0]
        for axes, fill in zip(row, fills, strict=True):
            fill(axes)
        row[0].set_ylim(bottom=0)  # after the last: it ends the scaling to what is drawn
        _plain_numbers(row[0].yaxis)
        figure.draw_without_rendering()
        for axes in row:
            _thin(axes.get_xticklabels())
        part = path.with_name(f".{path.name}")
        figure.savefig(part, format="png", metadata={"Software": None})
    os.replace(part, path)
    return path


def _add_lines(axes: Any, lines: Sequence[Line], marker: str | None = None) -> None:
    for line, colour in zip(lines, COLOURS, strict=False):
        colour = line.colour or colour
        axes.plot(line.x, line.y, label=line.label, color=colour, linestyle="--" if line.dashed else "-", marker=marker,
                  markersize=5)  # fmt: skip
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)


def _thin(labels: Sequence[Any]) -> None:
    """Hide each label that would touch the next one shown, from the right; their ticks stay."""
    edge = float("inf")
    for label in reversed(labels):
        box = label.get_window_extent()
        if box.x1 + box.height / 2 > edge:
            label.set_visible(False)
        else:
            edge = box.x0


def _plain_numbers(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
