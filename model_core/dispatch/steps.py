"""The time of one decode step of the real chain, at a realistic context: what calibration compares.

A step here has the first layers of the model only, enough of them that weights come from memory, then head and sampler.
Every slot holds a sequence of garbage on pages of its own; serving overwrites what is written there before it reads it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from model_core.dispatch.tiles import NEAR, StepTiles
from model_core.kernels.decode.partition import prefer_shared
from model_core.model.config import ModelConfig
from model_core.model.decode import DecodeChain

_LAYERS = 8
_WIDE_LAYERS = 4  # of models whose layers are 400 MB and more: with 8 of them Llama-2-7B took 33.7 s to calibrate (H100)
_NEAR, _FAR = 256, 1024  # position of the newest token; of long contexts the mean
_SERIES, _REPLAYS = 5, 3  # a series is timed as a whole: its first launch is felt less, and positions move little
_SETTLE_S = 0.3  # of work before the first measurement, which brings the clocks up


def step_layers(config: ModelConfig) -> int:
    """Layers of a measured step."""
    return min(config.num_layers, _WIDE_LAYERS if config.hidden_size >= 4096 else _LAYERS)


def longest_context(chain: DecodeChain, far: bool = False) -> int:
    """The bound for which a step is compiled and measured: the first or the second of what serving captures
    (engine/graphs.py)."""
    room = chain.state.block_tables.shape[1] * chain.kv.k[0].shape[1]
    return min(4 * NEAR if far else NEAR, chain.model.max_context, room)


def step_call(chain: DecodeChain, rows: torch.Tensor, tiles: StepTiles, layers: int, far: bool) -> Callable[[], object]:
    """One step of slots `rows` (int64 [M]), as something that can be pickled for the processes that compile."""
    return partial(chain.launch, rows, tiles, longest=longest_context(chain, far), layers=layers)


class Occupants:
    """Sequences in slots 0 to most - 1, until `leave`: then the slots are as new."""

    def __init__(self, chain: DecodeChain, most: int) -> None:
        self._state = state = chain.state
        pages, size = chain.kv.k[0].shape[:2]
        near_most, highest = (max(0, longest_context(chain, far) - _REPLAYS - 1) for far in (False, True))
        self.near, mean = min(near_most, _NEAR), min(highest, _FAR)
        # Long contexts differ, and a step takes as long as its longest: how they are divided is felt. The first is the mean.
        share = ((torch.arange(most, device=state.position.device) * 37 + most // 2) % most + 0.5) / most
        lowest = max(0, 2 * mean - highest)
        self.far = lowest + (share * (highest - lowest)).to(state.position.dtype)
        each = min(-(-(highest + _REPLAYS + 1) // size), state.block_tables.shape[1])
        own = torch.arange(most * each, device=state.position.device).view(most, each)
        state.block_tables[:most, :each] = (1 + own % max(1, pages - 1)).int()  # page 0 is the dump page
        ids = torch.arange(most, device=state.position.device)
        state.last_token[:most] = ids * 31 % chain.model.config.vocab_size
        for index in range(step_layers(chain.model.config)):  # numbers like those of a step: power depends on them
            for cache in chain.kv.layer(index):
                cache[1 : 1 + most * each].normal_()
        self._most = most
        self.place()

    def place(self, far: bool = False) -> None:
        """To where they are measured: a step moves every slot on by one."""
        self._state.position[: self._most] = self.far if far else self.near

    def leave(self) -> None:
        for tensor in (self._state.position, self._state.block_tables, self._state.last_token):
            tensor[: self._most].zero_()


class StepTimer:
    """Microseconds of a captured step, replayed between events, the median. Nothing that will be replayed in earnest may have
    been captured before `close`."""

    def __init__(self, chain: DecodeChain, most: int) -> None:
        """most: rows of the largest step."""
        self._chain, self._layers = chain, step_layers(chain.model.config)
        self._stream = torch.cuda.Stream(chain.q.device)
        self._rows = torch.arange(most, device=chain.q.device)
        self._occupants = Occupants(chain, most)
        self._settled = False

    def __call__(self, rows: int, tiles: StepTiles, far: bool = False) -> float:
        """far: of long contexts. Raises whatever a kernel that does not compile or launch raises."""
        self._occupants.place(far)
        graph = self._capture(step_call(self._chain, self._rows[:rows], tiles, self._layers, far), tiles.shared)
        until = time.monotonic() + (0.0 if self._settled else _SETTLE_S)
        self._series_us(graph, far)
        while time.monotonic() < until:
            self._series_us(graph, far)
        self._settled = True
        return statistics.median(self._series_us(graph, far) for _ in range(_SERIES))

    def _capture(self, work: Callable[[], object], shared: int) -> torch.cuda.CUDAGraph:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # what is compiled, loaded and allocated for good is then there
            work()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # The outer stream is restored even if the capture fails; thread_local: other threads may call CUDA meanwhile.
        with (torch.cuda.stream(torch.cuda.current_stream()), prefer_shared(shared),
              torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local")):  # fmt: skip
            work()
        return graph

    def _series_us(self, graph: torch.cuda.CUDAGraph, far: bool) -> float:
        self._occupants.place(far)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(_REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * begin.elapsed_time(end) / _REPLAYS

    def close(self) -> None:
        """Empty the slots, and give back what cuBLAS keeps for the timer's stream."""
        self._occupants.leave()
        torch.cuda.synchronize()
        if (clear := getattr(torch._C, "_cuda_clearCublasWorkspaces", None)) is not None:
            clear()
        torch.cuda.empty_cache()
