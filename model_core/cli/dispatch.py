"""`mini-llm dispatch [MODEL]`: which implementation runs for which op and size on this machine, and why."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from model_core.cli import options as opt
from model_core.engine.config import CALIBRATIONS


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="mini-llm dispatch",
        description="The dispatch table of a model on this machine. On a GPU decode steps are measured if they have not been "
        "(half a minute, kept in ~/.cache/mini-llm/dispatch).",
    )
    opt.add_model(parser, positional=True)
    opt.add_engine(parser)
    parser.add_argument("--calibration", choices=CALIBRATIONS, default="auto",
                        help="auto: measure what was not measured yet; again: measure all now; off: defaults")  # fmt: skip
    parser.add_argument("--max-seqs", type=int, help="sequences computed at once (default: as served); tables are per value")
    parser.add_argument("--all", action="store_true", help="every candidate with its time, not only the choice")
    options = parser.parse_args(argv)
    local = opt.local_model(options)
    config = replace(opt.engine_config(options, max_seqs=options.max_seqs), calibration=options.calibration)

    from rich.console import Console
    from rich.table import Table

    from model_core.dispatch.steps import step_layers
    from model_core.engine.load import load_parts, place
    from model_core.weights.checkpoint import open_checkpoint

    model = open_checkpoint(local.path).config
    placed = place(model, config)
    if placed.device.type == "cuda":
        rows = load_parts(local.path, config).runner.explain()
    else:
        from model_core.dispatch.ops import Ops

        rows = Ops(placed.device, overrides=config.kernels, invariant=config.deterministic).explain()
    where = f"{placed.device.type}, {str(placed.dtype).removeprefix('torch.')}"
    title = f"{local.name} on {where}"
    if any(row["op"].startswith("decode ") for row in rows):
        title += (f". us: a decode step of {step_layers(model)} layers, head and sampler, with this candidate and the best of "
                  "the choices above it")  # fmt: skip
    view = Table(title=title, title_justify="left")
    for column in ("op", "rule", "choice", "us", "reason"):
        view.add_column(column, justify="right" if column == "us" else "left", overflow="fold")
    for row in rows:
        view.add_row(row["op"], row["rule"], row["choice"], _time(row["candidates"], row["choice"]), row["reason"])
        others = [name for name in row["candidates"] if name != row["choice"]] if options.all else []
        for name in others:
            view.add_row("", "", f"  {name}", _time(row["candidates"], name), "", style="dim")
    Console().print(view)
    return 0


def _time(candidates: dict[str, Any], name: str) -> str:
    """Microseconds, or nothing where none were measured."""
    microseconds = candidates.get(name)
    return "" if microseconds is None else f"{microseconds:.2f}"
