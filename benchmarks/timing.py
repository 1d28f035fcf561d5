"""Timing on a GPU: CUDA-graph replays between events, medians; and what its memory and tensor cores give at most."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]


def capture(work: Call) -> torch.cuda.CUDAGraph:
    """`work` as a graph; it runs twice before, so that everything is compiled and allocated."""
    stream = _stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    return graph


@functools.cache
def _stream() -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps 32 MiB for every stream that it has seen."""
    return torch.cuda.Stream()


def microseconds(calls: Sequence[Call]) -> float:
    """Median time of one call, over a graph of all `calls` (give each its own data, more than the L2 holds)."""
    graph = capture(lambda: [call() for call in calls])
    return replay_us(graph) / len(calls)


def replay_us(graph: torch.cuda.CUDAGraph, *, repeats: int = 9, inner: int = 1) -> float:
    """Median microseconds of one replay, each measurement covering `inner` of them."""
    graph.replay()
    return _median_us(graph.replay, repeats=repeats, inner=inner)


def _median_us(call: Call, *, repeats: int, inner: int) -> float:
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(inner):
            call()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / inner)
    return statistics.median(times)


class ColdCache:
    """Times calls whose data cannot be in the L2 cache, however few they are.

    A graph reads `nbytes` of something else and runs the calls, another one only reads: the difference of their medians is the
    calls' time, the gaps between their launches included, the launch of the graph excluded.
    """

    def __init__(self, nbytes: int = 256 << 20) -> None:
        self._other = torch.zeros(nbytes // 4, dtype=torch.float32, device="cuda")
        self._alone: dict[int, torch.cuda.CUDAGraph] = {}
        keep_busy(lambda: torch.sum(self._other))

    def microseconds(self, calls: Sequence[Call], *, before: Sequence[Call] = (), rounds: int = 1) -> float:
        """Of one call. before: what runs in both graphs ahead of `calls`, e.g. because it writes what they find in the cache.
        rounds: how many times a graph does all of it, for few short calls."""
        timed = capture(lambda: self._rounds(rounds, (*before, *calls)))
        if before or rounds not in self._alone:
            rest = capture(lambda: self._rounds(rounds, before))
            if not before:
                self._alone[rounds] = rest
        else:
            rest = self._alone[rounds]
        whole, less = replay_us(timed), replay_us(rest)
        return max(0.01, whole - less) / (rounds * len(calls))

    def _rounds(self, rounds: int, calls: Sequence[Call]) -> list[object]:
        """What the calls return is kept until all ran, so that each writes to memory of its own."""
        return [(torch.sum(self._other), *(call() for call in calls)) for _ in range(rounds)]


def copies(nbytes: int, most: int) -> int:
    """How many times there must be data of `nbytes` that no GPU's L2 holds all of them; from 1 to `most`."""
    return max(1, min(most, (120 << 20) // max(1, nbytes)))


def keep_busy(work: Call, seconds: float = 0.3) -> None:
    """Run `work` again and again: an idle GPU needs a while to reach its clocks."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        work()
        torch.cuda.synchronize()


def bandwidths(nbytes: int = 1 << 30) -> dict[str, float]:
    """Bytes per second of plain ways through memory, what is read and what is written both counted.

    copy: an elementwise kernel from one tensor of `nbytes` to another. read: a sum over one. memcpy: Tensor.copy_, which for
    contiguous tensors of one dtype, whichever that is, is cudaMemcpy, here as a node of a graph; memcpy_eager: the same without
    a graph. memcpy is no ceiling: it reached 2.42 TB/s on an H100 whose kernels read 3.05 (NVIDIA/cccl issue 1672 finds two
    thirds of the bandwidth on an H200).
    """
    found = _bandwidths(nbytes)
    torch.cuda.empty_cache()  # who comes next may want all of the memory
    return found


def _bandwidths(nbytes: int) -> dict[str, float]:
    source = torch.randn(nbytes // 4, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    ways: dict[str, tuple[int, Call]] = {
        "copy": (2 * nbytes, lambda: torch.neg(source, out=target)),
        "read": (nbytes, lambda: torch.sum(source)),
        "memcpy": (2 * nbytes, lambda: target.copy_(source)),
    }
    keep_busy(ways["copy"][1])
    found = {name: 1e6 * size / microseconds([call] * 4) for name, (size, call) in ways.items()}
    size, call = ways["memcpy"]
    return {**found, "memcpy_eager": 1e6 * size / _median_us(call, repeats=9, inner=4)}


def copy_bandwidth() -> float:
    """The best of `bandwidths`: bytes per second, read and written, that a kernel can hope for."""
    return max(bandwidths().values())


def matmul_flops(dtype: torch.dtype = torch.bfloat16, size: int = 8192) -> float:
    """Operations per second of cuBLAS in a large square product: what tensor cores can hope for."""
    a, b, out = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(3))
    return 2e6 * size**3 / microseconds([lambda: torch.mm(a, b, out=out)] * 4)
