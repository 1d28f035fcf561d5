"""Captured steps: a decode graph per bucket of rows, a prefill graph per bucket of tokens, each replayed by one call.

A graph reads its inputs from fixed tensors and samples and advances its slots by itself, so the host only says which slots
a step is about. Buckets that were not captured yet are captured when they are first needed or while the engine is quiet: the
kernels themselves are compiled at start.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from model_core.dispatch.ops import Ops
from model_core.dispatch.tiles import NEAR, StepTiles
from model_core.engine.chunks import fields_of
from model_core.engine.packed import Packed
from model_core.kernels.decode.partition import DRIVERS_CHOICE, prefer_shared
from model_core.kernels.decode.restrict import restrict
from model_core.kernels.decode.sample import SampleSpace, sample
from model_core.kernels.decode.state import DecodeState
from model_core.kernels.decode.tiles import columns
from model_core.kernels.paged_attention import block_tokens
from model_core.model.batch import Batch
from model_core.model.decode import DecodeChain
from model_core.model.kv import KVCache
from model_core.model.llama import Llama

PREFILL_SEQS = 64  # sequences of a prefill graph, each of which has a row of logits whether it is there or not
WIDE_TOKENS = 2048  # of a prefill graph that takes any number of sequences: there the rows are few percent of the work


class Replay(Protocol):
    def replay(self) -> None: ...


@dataclass(frozen=True)
class Eager:
    """A graph that is none: `replay` calls the work. For devices without graphs (tests of all else on a CPU)."""

    replay: Callable[[], None]


class GraphPool:
    """Captures share one memory pool: only one graph runs at a time, and nothing in it outlives its replay."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()

    def capture(self, work: Callable[[], None], shared: int = DRIVERS_CHOICE) -> Replay:
        """`work` as a graph. It runs once before: what it compiles and allocates for good is then there. shared: see
        kernels/decode/partition.py."""
        if not self._cuda:
            return Eager(work)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads of the process (transport, metrics) may call CUDA meanwhile
        with (prefer_shared(shared),
              torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")):  # fmt: skip
            work()
        return graph


def row_buckets(most: int) -> list[int]:
    """Rows of decode graphs: dense where a row more is felt."""
    steps = [1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 768, 1024]
    return [*(size for size in steps if size < most), most]


def token_buckets(most: int) -> list[int]:
    """Tokens of prefill graphs: steps of 128, the tile of a matrix product, and wider ones where they are few percent."""
    steps = [16, 32, 64, *range(128, 2048, 128), *range(2048, 4096, 256), *range(4096, 16384 + 1, 1024)]
    return [*(size for size in steps if size < most), most]


def fitting(buckets: list[int], size: int) -> int:
    """The smallest bucket that holds `size`."""
    return buckets[bisect_left(buckets, size)]


class DecodeGraphs:
    """One graph per (bucket of rows, bucket of the longest context, whether a row is `ruled`: see DecodeChain.launch).
    `rows` [max_seqs] are the graphs' own."""

    def __init__(self, chain: DecodeChain, tiles: dict[int, StepTiles], max_context: int, pool: GraphPool) -> None:
        self.chain, self.tiles, self.pool = chain, tiles, pool
        self.buckets = sorted(tiles)
        device = chain.q.device
        self.rows = torch.full((self.buckets[-1],), chain.state.dump, dtype=torch.int64, device=device)
        # Beyond MAX_SPLITS splits the grid stays the same: three widths are enough.
        self.lengths = [length for length in (NEAR, 4 * NEAR) if length < max_context] + [max_context]
        self._graphs: dict[tuple[int, int, bool], Replay] = {}
        for rows, choice in tiles.items():
            chain.reserve(rows, choice)

    def missing(self) -> Iterable[tuple[int, int, bool]]:
        """What is not captured yet, the likeliest first."""
        keys = ((rows, longest, ruled) for longest in self.lengths for ruled in (False, True) for rows in self.buckets)
        return (key for key in keys if key not in self._graphs)

    def get(self, rows: int, longest: int, ruled: bool = False) -> Replay:
        key = (rows, longest, ruled)
        if key not in self._graphs:
            slots = self.rows[:rows].clone()
            self.rows[:rows] = self.chain.state.dump  # the run before the capture must not advance anybody
            self._graphs[key] = self.pool.capture(lambda: self.compute(*key), self.tiles[rows].shared)
            self.rows[:rows] = slots
        return self._graphs[key]

    def kinds(self) -> dict[tuple[int, StepTiles], int]:
        """(width, tiles) -> a bucket, of all steps that differ in their kernels: those are compiled for the width of an
        accumulator, only the plain row kernels for a number of rows."""
        return {(rows if tiles.in_rows else columns(rows), tiles): rows for rows, tiles in self.tiles.items()}

    def compute_kinds(self) -> None:
        """Launch every kernel once: 6 steps for TinyLlama's 17 buckets."""
        for rows in self.kinds().values():
            for longest in self.lengths[:2]:
                self.compute(rows, longest)

    def compute(self, rows: int, longest: int, ruled: bool = True) -> None:
        """The same without a graph: the twin for debugging and for compiling."""
        self.chain.launch(self.rows[:rows], self.tiles[rows], longest=longest, ruled=ruled)


@dataclass
class PrefillGraph:
    """One bucket. Inputs are fields of `packed`; afterwards `logits` [seqs, vocab] holds what was sampled from."""

    tokens: int
    seqs: int
    packed: Packed
    logits: torch.Tensor
    graph: Replay | None = None


class PrefillGraphs:
    """Chunks of prompts, as one variable-length batch per graph.

    Inputs are those of chunks.py. A graph has room for `seqs` sequences if it is wide (`narrow` is then
    PREFILL_SEQS) or decodes are computed by no other (narrow = seqs).
    """

    def __init__(self, model: Llama, ops: Ops, kv: KVCache, state: DecodeState, buckets: list[int], pool: GraphPool, *,
                 seqs: int, narrow: int) -> None:
        self.model, self.ops, self.kv, self.state, self.buckets, self.pool = model, ops, kv, state, buckets, pool
        config = model.config
        self.device = model.embed.device
        self.block = block_tokens(config.num_heads // config.num_kv_heads, config.head_dim, model.dtype)
        self.seqs, self._narrow = seqs, min(seqs, narrow)
        # buckets that together launch every kernel: the products of an invariant model have tiles by the number of rows
        self.compiling = buckets if model.invariant and self.device.type == "cuda" else buckets[:1]
        self.samples = SampleSpace(seqs, self.device)
        self.logits = torch.empty((seqs, config.vocab_size), dtype=torch.float32, device=self.device)
        self._graphs: dict[int, PrefillGraph] = {}

    def seqs_of(self, tokens: int, seqs: int = 0) -> int:
        """Sequences that a graph of so many tokens takes at most, or so many `seqs` in parts that have fewer tokens."""
        wide = self.seqs if fitting(self.buckets, tokens) >= WIDE_TOKENS else self._narrow
        return wide if seqs <= wide else self._narrow

    def missing(self) -> Iterable[int]:
        return (tokens for tokens in reversed(self.buckets) if tokens not in self._graphs or not self._graphs[tokens].graph)

    def get(self, tokens: int, *, capture: bool = True) -> PrefillGraph:
        if tokens not in self._graphs:
            seqs = min(self.seqs_of(tokens), tokens)
            packed = Packed(fields_of(tokens, seqs, tokens // self.block + seqs), self.device)
            packed.device["slots"].fill_(self.state.dump)
            packed.device["sample_slots"].fill_(self.state.dump)
            packed.device["blocks"].fill_(-1)
            packed.device["context_len"].fill_(1)
            self._graphs[tokens] = PrefillGraph(tokens, seqs, packed, self.logits[:seqs])
        found = self._graphs[tokens]
        if capture and found.graph is None:
            found.graph = self.pool.capture(lambda: self.compute(found))
        return found

    def compute(self, bucket: PrefillGraph) -> None:
        """The same without a graph: the twin for debugging and for compiling."""
        self._compute(bucket, bucket.packed.device["logit_rows"])

    @torch.inference_mode()
    def compute_with_hidden(self, bucket: PrefillGraph, rows: torch.Tensor) -> torch.Tensor:
        """The same, and the hidden states of these rows of the batch: [len(rows), hidden]."""
        return self._compute(bucket, torch.cat([bucket.packed.device["logit_rows"], rows]))[bucket.seqs :]

    def _compute(self, bucket: PrefillGraph, logit_rows: torch.Tensor) -> torch.Tensor:
        """Samples from the first `seqs` of logit_rows; returns the hidden states of them all."""
        d, state = bucket.packed.device, self.state
        slots = d["slots"]
        # Slots begin here, and are placed at the last token of this chunk: the sampler advances those that sample.
        state.temperature[slots] = d["temperature"]
        state.seed[slots] = d["seed"]
        state.position[slots] = torch.where(slots == state.dump, 0, d["context_len"] - 1)
        ids = d["token_ids"]
        ids = torch.where(ids < 0, state.last_token[(-1 - ids).clamp_(min=0)], ids)
        batch = Batch(
            token_ids=ids, positions=d["positions"], slot_mapping=d["slot_mapping"], query_start=d["query_start"],
            context_len=d["context_len"], block_tables=state.block_tables.index_select(0, slots), logit_rows=logit_rows,
            query_lens=[], context_lens=[], num_decodes=0, blocks=d["blocks"].view(-1, 2))  # fmt: skip
        hidden = self.model.hidden_states(batch, self.kv, self.ops)
        bucket.logits.copy_(self.model.logits(hidden[: bucket.seqs]))
        restrict(bucket.logits, d["sample_slots"], state, self.samples, pdl=False)
        sample(bucket.logits, d["sample_slots"], state, self.samples, pdl=False)
        return hidden
