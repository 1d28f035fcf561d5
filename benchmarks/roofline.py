"""A decode step, kernel by kernel: microseconds, bytes, operations, and the share of what the GPU could do.

    python -m benchmarks.roofline [--model tinyllama-1.1b] [--batch 1 8 32 64 128 256] [--context 256] [--out FILE]

Seeded random weights in the engine's own runner, with the tiles that it chose. What an engine's first start compiles and
measures comes first: a minute where Triton's cache is empty, seconds after benchmarks.decode on the same machine.

step is the decode graph replayed back to back, every sequence at `context` keys on pages of its own. A kernel's time is that of
a graph of all its launches in a step (those of qkv in all layers, one after the other, chained as in the step) on data that are
not in the L2 cache, divided by their number; head and sampler, launched once, are timed behind what comes before them. Where
cuBLAS computes a product, its row holds that and the small kernel behind it. "launches and gaps" is what the step takes beyond
the sum: below 0 where kernels of different kinds overlap better than those of one kind. bytes and flops are the formulas of the
kernels' files; the limit of a kernel is the longer of bytes / bandwidth and flops / speed of cuBLAS's best product, both
measured in the same run. Written to benchmarks/results/<gpu>/roofline.json, with a chart per model beside it.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.plots import PALE, Bars, draw_stacks
from benchmarks.random_model import SHAPES, hf_config, random_parameters
from benchmarks.report import write_report
from benchmarks.timing import ColdCache, copy_bandwidth, matmul_flops, replay_us
from model_core.dispatch.tiles import StepTiles
from model_core.engine.config import EngineConfig
from model_core.engine.graph_runner import GraphRunner
from model_core.engine.graphs import DecodeGraphs, fitting
from model_core.engine.load import assemble, place
from model_core.kernels.decode import attention, embed, gate_up, head, project, qkv, sample
from model_core.kernels.decode.partition import prefer_shared
from model_core.model import decode
from model_core.model.config import ModelConfig
from model_core.model.decode import DecodeChain

KERNELS = ("embed", "qkv", "attention", "o", "gate_up", "down", "head", "sample")
GAPS, STEP = "launches and gaps", "step"
_AHEAD = 32  # tokens that replays of a step may advance a slot by


@dataclass(frozen=True)
class Launch:
    """One op of a step, to be called again by itself."""

    kernel: str
    call: Callable[[], object]


def launches(chain: DecodeChain, rows: torch.Tensor, tiles: StepTiles, longest: int) -> list[Launch]:
    """The ops of a step in order, with the arguments that the chain gives them. Runs the step once."""
    found: list[Launch] = []
    outputs = {layer.o.weight.data_ptr() for layer in chain.model.layers if layer.o.weight is not None}

    def recording(op: Callable[..., object], kernel: str) -> Callable[..., None]:
        def call(*args: Any, **options: Any) -> None:
            parts = chain.stream.parts  # set by who wrote the stream last

            def again() -> None:
                chain.stream.parts = parts
                op(*args, **options)

            name = kernel if kernel != "project" else "o" if args[1].data_ptr() in outputs else "down"
            found.append(Launch(name, again))
            again()

        return call

    recorders: dict[str, Any] = {name: recording(op, kernel) for name, op, kernel in chain_ops()}
    with mock.patch.multiple(decode, **recorders):
        chain.launch(rows, tiles, longest=longest)
    return found


def chain_ops() -> Iterator[tuple[str, Callable[..., object], str]]:
    """(name in model_core/model/decode.py, op, kernel) of all that a chain may call: qkv, qkv_tiles, qkv_library, ..."""
    for name, op in list(vars(decode).items()):
        if inspect.isfunction(op) and op.__module__.startswith("model_core.kernels.decode."):
            for kernel in ("embed", "qkv", "attention", "project", "gate_up", "head", "sample"):
                if name.startswith(kernel):
                    yield name, op, kernel


def costs(config: ModelConfig, batch: int, context: int, size: int) -> dict[str, tuple[int, int]]:
    """(bytes, flops) of one launch of each kernel; size: bytes of an element."""
    hidden, inner, vocab, q, kv = (config.hidden_size, config.intermediate_size, config.vocab_size, config.q_size,
                                   config.kv_size)  # fmt: skip
    contexts, heads, dim = [context] * batch, config.num_heads, config.head_dim
    return {
        "embed": (embed.bytes_moved(batch, hidden, size), embed.flops(batch, hidden)),
        "qkv": (qkv.bytes_moved(batch, q + 2 * kv, hidden, size), qkv.flops(batch, q + 2 * kv, hidden)),
        "attention": (attention.bytes_moved(contexts, heads, config.num_kv_heads, dim, size),
                      attention.flops(contexts, heads, dim)),
        "o": (project.bytes_moved(batch, hidden, q, size), project.flops(batch, hidden, q)),
        "gate_up": (gate_up.bytes_moved(batch, inner, hidden, size), gate_up.flops(batch, inner, hidden)),
        "down": (project.bytes_moved(batch, hidden, inner, size), project.flops(batch, hidden, inner)),
        "head": (head.bytes_moved(batch, vocab, hidden, size), head.flops(batch, vocab, hidden)),
        "sample": (sample.bytes_moved(batch, vocab), sample.flops(batch, vocab, noise=False)),
    }  # fmt: skip


@dataclass(frozen=True)
class Ceiling:
    """Bytes and operations per second."""

    bandwidth: float
    flops: float

    def limit_us(self, nbytes: int, flops: int) -> float:
        return 1e6 * max(nbytes / self.bandwidth, flops / self.flops)


def random_runner(shape: str, dtype: str, batch: int, context: int) -> GraphRunner:
    """An engine's runner over random weights, without the engine's thread; its pool holds `batch` sequences."""
    model = ModelConfig.from_hf(hf_config(shape))
    page = EngineConfig().page_size
    pages = 1 + max(batch * -(-(context + _AHEAD) // page), -(-model.context_length // page))
    size = pages * page * model.kv_bytes_per_token(getattr(torch, dtype).itemsize)
    settings = EngineConfig(dtype=dtype, max_seqs=batch, kv_cache_bytes=size)
    placed = place(model, settings)
    parameters = random_parameters(model, dtype=placed.dtype, device=placed.device)
    runner = assemble(model, parameters, settings, placed).runner
    if not isinstance(runner, GraphRunner) or runner.decodes is None:
        sys.exit(f"{shape} is not decoded by fused kernels in captured graphs here")
    for tensor in (*runner.kv.k, *runner.kv.v):
        tensor.normal_()
    return runner


def occupy(runner: GraphRunner, decodes: DecodeGraphs, batch: int, context: int) -> None:
    """Slots 0.. are a batch of sequences with `context` keys each, the newest token's included, on pages of their own."""
    state, each = runner.state, -(-(context + _AHEAD) // runner.page_size)
    decodes.rows.fill_(state.dump)
    decodes.rows[:batch] = torch.arange(batch, device=runner.device)
    pages = torch.randperm(batch * each, generator=torch.Generator().manual_seed(0)) + 1  # page 0 is the dump slot's
    state.block_tables[:batch, :each] = pages.view(batch, each).int().to(runner.device)
    ids = torch.randint(runner.model.config.vocab_size, (batch,), generator=torch.Generator().manual_seed(1))
    state.last_token[:batch] = ids.to(runner.device)
    state.position[:batch] = context - 1


def measure(runner: GraphRunner, batch: int, context: int, cold: ColdCache) -> tuple[float, dict[str, tuple[int, float]]]:
    """Microseconds of a step, and (launches in it, microseconds of one) of each kernel."""
    assert runner.decodes is not None
    decodes, state = runner.decodes, runner.state
    bucket, longest = fitting(decodes.buckets, batch), fitting(decodes.lengths, context + _AHEAD)
    graph = decodes.get(bucket, longest)
    occupy(runner, decodes, batch, context)
    state.position[:batch] -= 20  # a replay moves every slot on by one: 41 of them around `context`
    step = replay_us(graph, repeats=5, inner=8)  # type: ignore[arg-type]
    occupy(runner, decodes, batch, context)
    tiles = decodes.tiles[bucket]
    ops = launches(decodes.chain, decodes.rows[:bucket], tiles, longest)
    found = {}
    for kernel in KERNELS:
        calls = [op.call for op in ops if op.kernel == kernel]
        if not calls:  # with one row the embedding is read by the first layer
            continue
        occupy(runner, decodes, batch, context)
        with prefer_shared(tiles.shared):  # as the step's graph was captured; `launches` has loaded the kernels
            if len(calls) > 1:
                found[kernel] = len(calls), cold.microseconds(calls, rounds=2)
            else:
                place = [op.kernel for op in ops].index(kernel)
                before = [op.call for op in ops[max(0, place - 1) : place]]
                found[kernel] = 1, cold.microseconds(calls, before=before, rounds=8)
    return step, found


def describe(
    config: ModelConfig, batch: int, context: int, size: int, step: float, found: dict[str, tuple[int, float]],
    choices: dict[str, str], ceiling: Ceiling,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of one batch: its kernels, what is between them, the step."""
    cost = costs(config, batch, context, size)
    rows = [line(name, choices.get(name, ""), calls, us, *cost[name], step, ceiling) for name, (calls, us) in found.items()]
    busy = sum(calls * us for calls, us in found.values())
    nbytes, flops = (sum(calls * cost[name][part] for name, (calls, _) in found.items()) for part in (0, 1))
    limit = sum(calls * ceiling.limit_us(*cost[name]) for name, (calls, _) in found.items())
    gaps = {**dict.fromkeys(rows[0]), "kernel": GAPS, "choice": "", "step_us": round(step - busy, 2),
            "share_of_step": round(1 - busy / step, 4)}  # fmt: skip
    total = line(STEP, "", 1, step, nbytes, flops, step, ceiling)
    total |= {"limit_us": round(limit, 3), "share_of_limit": round(limit / step, 3)}
    return [{"batch": batch, "context": context, **row} for row in (*rows, gaps, total)]


def line(
    kernel: str, choice: str, calls: int, us: float, nbytes: int, flops: int, step: float, ceiling: Ceiling
) -> dict[str, Any]:
    limit = ceiling.limit_us(nbytes, flops)
    return {
        "kernel": kernel, "choice": choice, "calls": calls, "us": round(us, 3), "bytes": nbytes, "flops": flops,
        "gb_s": round(nbytes / us / 1e3, 1), "tflops": round(flops / us / 1e6, 2),
        "share_of_copy": round(1e6 * nbytes / us / ceiling.bandwidth, 3), "limit_us": round(limit, 3),
        "share_of_limit": round(limit / us, 3), "step_us": round(calls * us, 2), "share_of_step": round(calls * us / step, 4),
    }  # fmt: skip


def draw(report: Path, shape: str, rows: list[dict[str, Any]], context: int) -> Path | None:
    rows = [row for row in rows if row["model"] == shape]
    batches = sorted({row["batch"] for row in rows})
    at = {(row["batch"], row["kernel"]): row for row in rows}
    parts = []
    for kernel in (*KERNELS, GAPS):
        values = [at[batch, kernel]["step_us"] / 1e3 if (batch, kernel) in at else None for batch in batches]
        bars = [None if value is None else max(0.0, value) for value in values]
        parts.append(Bars(kernel, bars, colour=PALE if kernel == GAPS else None))
    steps = [at[batch, STEP] for batch in batches]
    return draw_stacks(
        report, [str(batch) for batch in batches], parts, title=f"A decode step of {shape}, {context} keys each",
        x_label="sequences", y_label="ms (each kernel alone, the step on top)",
        totals=[f"{row['us'] / 1e3:.2f}" for row in steps], limits=[row["limit_us"] / 1e3 for row in steps],
        limit_label="limit", out=report.with_name(f"{report.stem}-{shape}.png"))  # fmt: skip


def model_rows(shape: str, options: argparse.Namespace, cold: ColdCache, ceiling: Ceiling) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    batches = sorted(set(options.batch))
    runner = random_runner(shape, options.dtype, batches[-1], options.context)
    assert runner.decodes is not None
    for batch in batches:
        step, found = measure(runner, batch, options.context, cold)
        tiles = runner.decodes.tiles[fitting(runner.decodes.buckets, batch)]
        choices = {kernel: str(choice) for kernel in KERNELS if (choice := getattr(tiles, kernel, None))}
        size = runner.model.dtype.itemsize
        described = describe(runner.model.config, batch, options.context, size, step, found, choices, ceiling)
        rows += ({"model": shape, "dtype": options.dtype, **row} for row in described)
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["tinyllama-1.1b"], choices=SHAPES)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--context", type=int, default=256, help="keys of each sequence")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device; benchmarks.cpu_decode measures CPU decoding")
    for shape in options.model:
        if options.context + _AHEAD > (most := SHAPES[shape]["max_position_embeddings"]):
            sys.exit(f"--context must be at most {most - _AHEAD} for {shape}")
    ceiling = Ceiling(copy_bandwidth(), matmul_flops(getattr(torch, options.dtype)))
    cold = ColdCache()
    rows: list[dict[str, Any]] = []
    for shape in options.model:
        rows += model_rows(shape, options, cold, ceiling)
        torch.cuda.empty_cache()
    path = write_report("roofline", rows, out=options.out)
    charts = [draw(path, shape, rows, options.context) for shape in options.model]
    print(f"bandwidth {ceiling.bandwidth / 1e12:.2f} TB/s, products {ceiling.flops / 1e12:.0f} TFLOP/s")
    print("model           batch  kernel             calls       us       MB    GB/s  TFLOP/s  of bandwidth  of limit  of step")
    for row in rows:
        start, rest = "{model:15}{batch:6}  {kernel:17}", "{step_us:16.2f}{share_of_step:56.1%}"
        if row["kernel"] != GAPS:
            rest = ("{calls:7}{us:9.2f}{mb:9.2f}{gb_s:8.0f}{tflops:9.1f}{share_of_copy:14.0%}{share_of_limit:10.0%}"
                    "{share_of_step:9.1%}")  # fmt: skip
        print((start + rest).format(**row, mb=(row["bytes"] or 0) / 1e6))
    for file in (path, *charts):
        if file:
            print(file)


if __name__ == "__main__":
    main()
