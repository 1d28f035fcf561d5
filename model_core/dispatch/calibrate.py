"""Which implementation computes each product of a decode step: measured on the chain that serves, with its own weights.

A product is timed as a captured graph of it alone, over all layers of the model one after the other, so that its weights come
from memory, with the launches chained as in a step. (A model whose product fits the L2 over all layers is timed warmer than
it runs.) Afterwards whole steps decide between the defaults and the fastest of each product: a kernel's time depends on its
neighbours. What the stream hands on beside its rows (sums of squares per tile of its writer) is the defaults' throughout.

Kernels are specialised on the width of their accumulator, not on the rows of a batch, so one measurement serves every bucket
whose kernels are the same: the nearest of 1, 8, 16, 32, 64, 128 and the largest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from model_core.dispatch.compile import compile_ahead
from model_core.dispatch.measured import Candidate, Measured, choose, label, reason, tried, with_products
from model_core.dispatch.tiles import MOST_ROWS, PRODUCTS, Choice, StepTiles, default_tiles
from model_core.kernels.decode.gate_up import gate_up
from model_core.kernels.decode.head import head
from model_core.kernels.decode.products import RowTiles
from model_core.kernels.decode.project import project
from model_core.kernels.decode.qkv import qkv
from model_core.kernels.decode.tiles import columns, part_width
from model_core.model.config import ModelConfig
from model_core.model.decode import DecodeChain
from model_core.weights.progress import Progress

REPRESENTATIVE = (1, 8, 16, 32, 64, 128)  # rows
TIE = 0.01  # share by which the default may be slower: less is noise, and would choose otherwise at the next start
_LIBRARY = StepTiles("library", "library", "library", "library", "library")
_HEAD_CALLS = 4  # there is one head only; it is larger than the L2 of most GPUs
_REPLAYS = 7
_SETTLE_S = 0.3  # of work before the first measurement, which brings the clocks up

Calls = Sequence[Callable[[], object]]
Timer = Callable[[Calls], float]
Ahead = Callable[..., dict[int, str]]


class Steps(Progress):
    """Progress in things, not bytes."""

    def _line(self, now: float) -> str:
        total, done = max(self._total or 1, 1), self._done
        share = min(1.0, done / total)
        rate = done / max(now - self._started, 1e-6)
        left = f", {max(0.0, total - done) / rate:.0f} s left" if rate > 0 else ""
        return f"{self._label} [{'#' * round(30 * share):.<30}] {min(done, total)} of {total}{left}"

    def end(self) -> None:
        self._write(f"{self._label}: {self._done} in {time.monotonic() - self._started:.1f} s")


class GraphTimer:
    """Microseconds of one call: a captured graph of all, replayed between events, the median."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._settled = False

    def __call__(self, calls: Calls) -> float:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # what is compiled and allocated for good is then there
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # The outer stream is restored even if the capture fails; thread_local: other threads may call CUDA meanwhile.
        with (torch.cuda.stream(torch.cuda.current_stream()),
              torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local")):  # fmt: skip
            for call in calls:
                call()
        graph.replay()
        until = time.monotonic() + (0.0 if self._settled else _SETTLE_S)
        while time.monotonic() < until:
            graph.replay()
            torch.cuda.current_stream().synchronize()
        self._settled = True
        return statistics.median(_replay_us(graph) for _ in range(_REPLAYS)) / len(calls)

    @staticmethod
    def close() -> None:
        """Give back what cuBLAS keeps for the timer's stream. Nothing that will be replayed may have been captured yet."""
        torch.cuda.synchronize()
        if (clear := getattr(torch._C, "_cuda_clearCublasWorkspaces", None)) is not None:
            clear()
        torch.cuda.empty_cache()


def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end)


def calibrate(chain: DecodeChain, buckets: list[int], progress: Progress, *, timer: Timer | None = None,
              workers: int | None = None, ahead: Ahead = compile_ahead) -> dict[int, Measured]:  # fmt: skip
    """Measure the products of steps of these buckets of rows, and choose. Before anything is captured; a step afterwards
    finds nothing changed but the dump page and the chain's buffers.

    timer, ahead: for tests. workers: processes that compile.
    """
    config, dtype = chain.model.config, chain.model.dtype
    points = representatives(buckets)
    plan = [(rows, op, choice) for rows in points for op in PRODUCTS for choice in tried(config, op, rows, dtype)]
    died = _compile(chain, plan, ahead, workers, progress)
    timed = timer or GraphTimer(chain.q.device)
    progress.begin("calibration, measuring", len(plan))
    found: dict[tuple[int, str], list[Candidate]] = {}
    for rows, op, choice in plan:
        _prepare(chain, rows, op, choice)
        calls = product_calls(chain, op, dump_rows(chain, rows), choice, config.num_layers)
        crashed = died.get(_kernel(chain, rows, op, choice))
        found.setdefault((rows, op), []).append(_measure(timed, calls, choice, crashed))
        progress.advance(1)
    progress.end()
    measured = {rows: _conclude(config, rows, dtype, {op: tuple(found[rows, op]) for op in PRODUCTS}) for rows in points}
    measured = _confirm(chain, measured, timed, ahead, workers)
    if isinstance(timed, GraphTimer):
        timed.close()
    return {bucket: measured[nearest(bucket, points)] for bucket in buckets}


def representatives(buckets: list[int]) -> list[int]:
    """The buckets that are measured: at least one of each width of kernels."""
    points = {bucket for bucket in buckets if bucket in REPRESENTATIVE} | {max(buckets)}
    for bucket in sorted(buckets, reverse=True):
        if _width(bucket) not in map(_width, points):
            points.add(bucket)
    return sorted(points)


def nearest(bucket: int, points: list[int]) -> int:
    """The measured bucket that speaks for this one."""
    return min((point for point in points if _width(point) == _width(bucket)), key=lambda point: (abs(point - bucket), point))


def _width(rows: int) -> tuple[bool, int]:
    """What kernels for so many rows are specialised on."""
    return rows <= MOST_ROWS, columns(rows)


def _kernel(chain: DecodeChain, rows: int, op: str, choice: Choice) -> tuple[object, ...]:
    """Names what has to be compiled: once for all measurements that launch it."""
    return op, choice, None if choice == "library" else _width(rows), _parts(chain, rows, op)


def _compile(chain: DecodeChain, plan: list[tuple[int, str, Choice]], ahead: Ahead,
             workers: int | None, progress: Progress) -> dict[tuple[object, ...], str]:  # fmt: skip
    """Compile what the plan needs; the kernels that took a compiler down, and why."""
    jobs = {_kernel(chain, rows, op, choice): partial(_launch_once, chain, op, dump_rows(chain, rows), choice)
            for rows, op, choice in plan}  # fmt: skip
    progress.begin("calibration, compiling", len(jobs))
    died = ahead(list(jobs.values()), workers, progress=progress)
    progress.end()
    return {kernel: died[index] for index, kernel in enumerate(jobs) if index in died}


def _launch_once(chain: DecodeChain, op: str, rows: torch.Tensor, choice: Choice) -> None:
    """In a compiling process: the launch whose kernels are wanted."""
    chain.stream.parts = _parts(chain, rows.shape[0], op)
    for call in product_calls(chain, op, rows, choice, 1)[:1]:
        call()


def dump_rows(chain: DecodeChain, rows: int) -> torch.Tensor:
    """A batch of nobody: every row is the dump slot, at position 0 of page 0."""
    return torch.full((rows,), chain.state.dump, dtype=torch.int64, device=chain.q.device)


def product_calls(chain: DecodeChain, op: str, rows: torch.Tensor, choice: Choice, layers: int) -> list[Callable[[], object]]:
    """One product as the chain computes it, a call per layer (of the head: a few)."""
    count = _HEAD_CALLS if op == "head" else layers
    if isinstance(choice, RowTiles):
        return [partial(_compute_in_rows, chain, op, index, rows, choice) for index in range(count)]
    m, model = rows.shape[0], chain.model
    if op == "qkv":
        return [partial(chain.compute_qkv, index, rows, choice) for index in range(count)]
    if op == "o":
        return [partial(chain.compute_project, chain.attended[:m], layer.o, layer.mlp_norm, choice)
                for layer in model.layers[:count]]  # fmt: skip
    if op == "gate_up":
        return [partial(chain.compute_gate_up, index, m, choice) for index in range(count)]
    if op == "down":
        return [partial(chain.compute_project, chain.inner[:m], layer.down, layer.attn_norm, choice)
                for layer in model.layers[:count]]  # fmt: skip
    return [partial(chain.compute_head, m, choice)] * count


def _compute_in_rows(chain: DecodeChain, op: str, index: int, rows: torch.Tensor, tiles: RowTiles) -> None:
    """One product of DecodeChain._in_rows, of a layer that is not the first."""
    model, state, pdl, eps, m = chain.model, chain.state, chain.pdl, chain.model.config.rms_eps, rows.shape[0]
    residual, inner, layer = chain.stream.residual[:m], chain.inner[:m], model.layers[0 if op == "head" else index]
    weight = (model.head if op == "head" else getattr(layer, op)).weight
    assert weight is not None
    if op == "qkv":
        qkv(residual, layer.attn_norm, weight, layer.qkv.bias, model.cos_sin, rows, state, *chain.kv.layer(index), chain.q[:m],
            eps=eps, tiles=tiles, embed=False, pdl=pdl)  # fmt: skip
    elif op == "gate_up":
        gate_up(residual, layer.mlp_norm, weight, inner, eps=eps, tiles=tiles, pdl=pdl)
    elif op == "head":
        head(residual, model.final_norm, weight, chain.logits[:m], eps=eps, tiles=tiles, pdl=pdl)
    else:
        x = chain.attended[:m] if op == "o" else inner
        project(x, weight, residual, residual, rows, state.last_token, tiles=tiles, embed=False, pdl=pdl)


def _prepare(chain: DecodeChain, rows: int, op: str, choice: Choice) -> None:
    """Numbers like those of a step (the power that arithmetic draws depends on them), and room for split sums."""
    for tensor in (chain.stream.residual, chain.stream.scaled, chain.q, chain.attended, chain.inner):
        tensor.normal_()
    chain.stream.parts = _parts(chain, rows, op)
    chain.stream.squares.fill_(16.0)
    if not isinstance(choice, RowTiles):
        chain.reserve(rows, with_products(_LIBRARY, {op: choice}))


def _parts(chain: DecodeChain, rows: int, op: str) -> int:
    """How many sums of squares a row of the stream has where `op` reads it, after the default product before it."""
    config = chain.model.config
    writer = getattr(default_tiles(config, rows, chain.model.dtype), "o" if op == "gate_up" else "down")
    return config.hidden_size // (part_width(config.hidden_size) if isinstance(writer, str) else writer.rows)


def _measure(timer: Timer, calls: Calls, choice: Choice, crashed: str | None) -> Candidate:
    if crashed is not None:
        return Candidate(choice, None, crashed)
    try:
        return Candidate(choice, round(timer(calls), 3))
    except Exception as error:  # a kernel that does not compile or launch here: another one serves
        lines = str(error).strip().splitlines() or [""]
        return Candidate(choice, None, f"{type(error).__name__}: {lines[0][:160]}")


def _conclude(config: ModelConfig, rows: int, dtype: torch.dtype, found: dict[str, tuple[Candidate, ...]]) -> Measured:
    default = default_tiles(config, rows, dtype)
    chosen = {op: choose(found[op], TIE) or getattr(default, op) for op in PRODUCTS}
    return Measured(rows, found, with_products(default, chosen), {op: reason(found[op], chosen[op]) for op in PRODUCTS})


def _confirm(chain: DecodeChain, measured: dict[int, Measured], timer: Timer, ahead: Ahead,
             workers: int | None) -> dict[int, Measured]:  # fmt: skip
    """Let whole steps judge where the choices are not the defaults, and those run."""
    config, dtype, longest = chain.model.config, chain.model.dtype, min(512, chain.model.max_context)
    jobs: list[tuple[int, Callable[[], object]]] = []
    for rows, found in measured.items():
        default = default_tiles(config, rows, dtype)
        runs = all(one.microseconds is not None for op in PRODUCTS for one in found.candidates[op][:1])
        for tiles in (default, found.tiles) if runs and found.tiles != default else ():
            chain.reserve(rows, tiles)
            batch = dump_rows(chain, rows)
            jobs.append((rows, partial(chain.launch, batch, torch.zeros_like(batch), tiles, longest=longest)))
    died = ahead([job for _, job in jobs], workers)
    times = [_measure(timer, [job], "library", died.get(index)) for index, (_, job) in enumerate(jobs)]
    pairs = {rows: pair for (rows, _), *pair in zip(jobs[::2], times[::2], times[1::2], strict=True)}
    return {rows: _judge(found, default_tiles(config, rows, dtype), *pairs[rows]) if rows in pairs else found
            for rows, found in measured.items()}  # fmt: skip


def _judge(found: Measured, default: StepTiles, with_default: Candidate, with_fastest: Candidate) -> Measured:
    """Keep the choices only if a whole step is the faster for them."""
    before, after = with_default.microseconds, with_fastest.microseconds
    step = {name: time for name, time in (("default", before), ("fastest", after)) if time is not None}
    if after is not None and (before is None or after < before):
        return replace(found, step=step)
    why = (f"with it a whole step takes {before:.1f} us, with the fastest of each product {after:.1f} us"
           if before is not None and after is not None else f"a whole step failed: {with_fastest.problem}")  # fmt: skip
    reasons = {op: found.reasons[op] if getattr(default, op) == (chosen := getattr(found.tiles, op)) else
               f"default: {why}, though {label(chosen)} is faster alone" for op in PRODUCTS}  # fmt: skip
    return replace(found, tiles=default, reasons=reasons, step=step)
