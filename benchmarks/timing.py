"""Timing on a GPU: CUDA-graph replays between events, medians."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch


def capture(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`work` as a graph; it runs twice before, so that everything is compiled and allocated."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def microseconds(calls: Sequence[Callable[[], object]], *, repeats: int = 9) -> float:
    """Median time of one call, over a graph of all `calls` (give each its own data, more than the L2 holds)."""
    graph = capture(lambda: [call() for call in calls])
    return replay_us(graph, repeats=repeats) / len(calls)


def replay_us(graph: torch.cuda.CUDAGraph, *, repeats: int = 9, inner: int = 1) -> float:
    """Median microseconds of one replay, each measurement covering `inner` of them."""
    times = []
    graph.replay()
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(inner):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / inner)
    return statistics.median(times)


def copy_bandwidth(nbytes: int = 2 << 30) -> float:
    """Bytes per second (read + written) of copying `nbytes` on the device: what a kernel can hope for."""
    source = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * nbytes / (1e-6 * microseconds([lambda: target.copy_(source)]))
