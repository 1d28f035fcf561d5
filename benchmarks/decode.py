"""Decode speed of the engine: milliseconds a step and tokens per second, by batch size.

    python -m benchmarks.decode [--model tinyllama-1.1b llama-2-7b llama-3-8b] [--batch 1 8 32 64 128 256] [--dtype bfloat16]

Seeded random weights; every sequence has a prompt of 128 random ids. step = (time of 257 new tokens - time of 1) / 256, the
best of --rounds, through the engine's own loop: scheduling, launching and reading tokens included. gpu_ms is the decode graph
alone, replayed back to back at the middle of that context; gap is what step has beyond it: the host, and the first steps, in
which some sequences are decoded while others' prompts are computed. idle is the host alone: the share of the time between two
steps, by events on the device, in the steps that decode the whole batch; host_us is what the engine's thread did in each of
these. limit is weights and KV cache read once at the copy bandwidth measured in the same run. Written to
benchmarks/results/<gpu>/decode.json.

--deterministic measures engines with `deterministic: true` and, for comparison, without: a row has the step of the former, of
the latter (default_step_ms), and times, their ratio. Written to deterministic.json. There is no decode graph to time alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.engines import TimedEngine, random_engine, random_prompts
from benchmarks.random_model import SHAPES
from benchmarks.report import write_report
from benchmarks.timing import copy_bandwidth, replay_us
from model_core.engine.graph_runner import GraphRunner
from model_core.engine.graphs import fitting
from model_core.engine.records import StepRecord

PROMPT, NEW = 128, 257


def measure(timed: TimedEngine, batch: int, rounds: int, peak: float) -> dict[str, Any]:
    engine = timed.engine
    vocab, seed = engine.info.vocab_size, 0
    best: dict[int, float] = {}
    for number in range(rounds + 1):  # the first warms up
        for new in (1, NEW):
            seed += 1
            seconds = timed.run(random_prompts(batch, PROMPT, vocab, seed), new).seconds
            best[new] = min(best.get(new, seconds), seconds) if number else seconds
    step_ms = 1e3 * (best[NEW] - best[1]) / (NEW - 1)
    model, runner = engine.parts.model, engine.parts.runner
    kv = batch * (PROMPT + NEW / 2) * model.kv_bytes_per_token(engine.parts.dtype.itemsize)
    limit_ms = 1e3 * (runner.model.nbytes_per_step + kv) / peak
    gpu_ms = graph_ms(runner, batch) if isinstance(runner, GraphRunner) and runner.decodes else None
    return {
        "dtype": engine.info.dtype, "batch": batch, "step_ms": round(step_ms, 4),
        "tokens_per_second": round(1e3 * batch / step_ms, 1),
        "gpu_ms": gpu_ms and round(gpu_ms, 4), "gap": gpu_ms and round(1 - gpu_ms / step_ms, 4),
        **between_steps(engine.records.last(NEW), batch), "limit_ms": round(limit_ms, 4),
        "share_of_limit": round(limit_ms / step_ms, 3),
    }  # fmt: skip


def between_steps(records: list[StepRecord], batch: int) -> dict[str, float | None]:
    """idle and host_us of the steps that decode the whole batch and nothing else; None if there is none."""
    full = [record for record in records if record.decodes == batch and not record.prefill_tokens]
    idle, busy = sum(record.idle_us for record in full), sum(record.gpu_us for record in full)
    host = [record.schedule_us + record.launch_us + record.emit_us for record in full]
    return {"idle": round(idle / (idle + busy), 4) if busy else None,
            "host_us": round(sum(host) / len(host), 1) if host else None}  # fmt: skip


def graph_ms(runner: GraphRunner, batch: int) -> float:
    """A decode graph back to back, every slot at the middle of the benchmark's context, on pages of its own."""
    assert runner.decodes is not None
    state, pages = runner.state, -(-(PROMPT + NEW) // runner.page_size)
    saved = [tensor.clone() for tensor in (state.position, state.block_tables, runner.decodes.rows)]
    runner.decodes.rows[:batch] = torch.arange(batch, device=runner.device)
    state.block_tables[:batch, :pages] = torch.arange(1, batch * pages + 1, device=runner.device).view(batch, pages).int()
    graph = runner.decodes.get(fitting(runner.decodes.buckets, batch), fitting(runner.decodes.lengths, PROMPT + NEW))
    # a replay moves every slot on by one: 33 of them around the middle
    state.position[:batch] = PROMPT + NEW // 2 - 16
    microseconds = replay_us(graph, repeats=4, inner=8)  # type: ignore[arg-type]
    for tensor, value in zip((state.position, state.block_tables, runner.decodes.rows), saved, strict=True):
        tensor.copy_(value)
    torch.cuda.synchronize()
    return microseconds / 1e3


def measure_all(shape: str, options: argparse.Namespace, peak: float, *, deterministic: bool) -> list[dict[str, Any]]:
    """A row for each batch size that the KV pool holds, by one engine that is gone afterwards."""
    rows = []
    with random_engine(shape, dtype=options.dtype, prefix_cache=False, deterministic=deterministic) as timed:
        for batch in options.batch:
            pool = timed.engine.info.pool_tokens
            if batch * (PROMPT + NEW + 16) > pool:
                print(f"{shape}: batch {batch} does not fit a pool of {pool} tokens", file=sys.stderr)
                continue
            mark = {"deterministic": True} if deterministic else {}
            rows.append({"model": shape, **mark, **measure(timed, batch, options.rounds, peak)})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def compare(shape: str, options: argparse.Namespace, peak: float) -> list[dict[str, Any]]:
    """Rows of a deterministic engine, each beside the step that any other takes."""
    default = {row["batch"]: row["step_ms"] for row in measure_all(shape, options, peak, deterministic=False)}
    rows = measure_all(shape, options, peak, deterministic=True)
    for row in rows:
        if row["batch"] in default:
            step = default[row["batch"]]
            row |= {"default_step_ms": step, "times": round(row["step_ms"] / step, 2)}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["tinyllama-1.1b", "llama-2-7b", "llama-3-8b"], choices=SHAPES)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--deterministic", action="store_true", help="what `deterministic: true` costs")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device; benchmarks.cpu_decode measures CPU decoding")
    peak = copy_bandwidth()
    rows = []
    for shape in options.model:
        if options.deterministic:
            rows += compare(shape, options, peak)
        else:
            rows += measure_all(shape, options, peak, deterministic=False)
    print("model            batch   step ms     tok/s   graph ms    gap   idle  host us   share of limit")
    for row in rows:
        print("{model:15}{batch:7}{step_ms:10.3f}{tokens_per_second:10.0f}".format(**row),
              f"{row['gpu_ms'] or 0:10.3f}{row['gap'] or 0:7.1%}{row['idle'] or 0:7.2%}{row['host_us'] or 0:9.0f}",
              f"{row['share_of_limit']:12.0%}")
    print(write_report("deterministic" if options.deterministic else "decode", rows, out=options.out))


if __name__ == "__main__":
    main()
