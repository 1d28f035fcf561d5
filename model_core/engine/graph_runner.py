"""The runner of a GPU: a step is one decode graph, or one prefill graph, on the same stream.

A step that has chunks of prompts computes its decodes in the same graph, as chunks of one token: the weights are read once.
Where they do not fit, or their contexts are so long that decode attention (which splits them) is needed, the decodes keep a
graph to themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from model_core.dispatch.calibrate import Steps
from model_core.dispatch.compile import WORKER_BYTES, compile_ahead, cores
from model_core.dispatch.measured import CHOICES, Measured, explain_row
from model_core.dispatch.ops import Ops
from model_core.dispatch.store import Mode, digest, facts, measured_choices
from model_core.dispatch.tiles import NEAR, StepTiles, default_tiles
from model_core.engine.chunks import Chunks
from model_core.engine.clock import MOST_AHEAD, Clock
from model_core.engine.flight import Chosen, InFlight
from model_core.engine.graphs import PREFILL_SEQS, DecodeGraphs, GraphPool, PrefillGraphs, fitting, row_buckets, token_buckets
from model_core.engine.late import LateRow, LateRows
from model_core.engine.memory import available_host_memory
from model_core.engine.packed import Packed
from model_core.engine.plan import Limits, Scheduled, Scored, StepPlan
from model_core.engine.sampler import Sampler
from model_core.engine.scores import Scorer, sent
from model_core.engine.sequence import Sequence
from model_core.engine.startup import Timed, untimed
from model_core.engine.tables import BlockTables
from model_core.kernels.decode.state import RING, DecodeState
from model_core.model.decode import DecodeChain, why_unsupported
from model_core.model.kv import KVCache
from model_core.model.llama import Llama

_LONGEST_JOINED = 4 * NEAR  # tokens of context: one program reads them all


class GraphRunner:
    """All state per slot lives on the device; the host keeps mirrors of what it must know.

    at[slot]: position of the slot's newest token, which only the device need know, or -1 while the slot's prompt is not
    computed to its end. A sequence is decoded by the decode graph if `at` is where it should be; otherwise its next token is
    a chunk like any other.
    """

    def __init__(self, model: Llama, ops: Ops, kv: KVCache, limits: Limits, page_size: int, device: torch.device, *,
                 pdl: bool = True, capture_at_start: bool = False,
                 tiles: dict[int, StepTiles] | None = None) -> None:  # fmt: skip
        self.model, self.kv, self.page_size, self.device = model, kv, page_size, device
        self.capture_at_start, self.ops = capture_at_start, ops
        self.sampler = Sampler(limits.max_seqs, model.config.vocab_size, device)
        self.scorer = Scorer(model, limits.max_seqs)
        self.max_pages = -(-limits.max_context // page_size)
        self.state = DecodeState.empty(limits.max_seqs, self.max_pages, device, self.sampler.counts)
        self.at = np.full(limits.max_seqs, -1, dtype=np.int64)
        pool = GraphPool(device)
        # decode kernels add in other orders than those of prompts, so an invariant model decodes by chunks of one token
        self.why_unfused = "deterministic" if model.invariant else why_unsupported(model.config, model.dtype)
        self.measured: dict[int, Measured] = {}
        self.decodes: DecodeGraphs | None = None
        if self.why_unfused is None:
            config = model.config
            tiles = tiles or {rows: default_tiles(config, rows, model.dtype) for rows in row_buckets(limits.max_seqs)}
            chain = DecodeChain(model, kv, self.state, limits.max_seqs, pdl=None if pdl else False)
            self.decodes = DecodeGraphs(chain, tiles, limits.max_context, pool)
        self.prefills = PrefillGraphs(model, ops, kv, self.state, token_buckets(limits.max_batch_tokens), pool,
                                      seqs=limits.max_seqs, narrow=PREFILL_SEQS if self.decodes else limits.max_seqs)
        self.late = LateRows(self.state, self.sampler, self.prefills.samples, invariant=model.invariant)
        self._rows = Packed([("rows", limits.max_seqs, "int64")], device)
        self._last_rows = np.zeros(0, dtype=np.int64)
        self._last_decodes: list[Sequence] = []
        self._last_slots = self._last_rows
        self._places = np.arange(limits.max_seqs)
        self._clock = Clock(device)
        self._tables = BlockTables(self.state, device)
        self._chosen = self.state.chosen.numpy()
        assert MOST_AHEAD + 1 < RING

    def launch(self, plan: StepPlan, proceed: Callable[[], object] = int) -> InFlight:
        for seq in plan.admitted:
            assert seq.slot is not None
            self._tables.clear(seq.slot)
            self.at[seq.slot] = -1
            self.late.assign(seq)
        if plan.admitted or plan.decodes != self._last_decodes:  # else they are in the slots where they were
            self._last_decodes, self._last_slots = plan.decodes, np.array([seq.slot for seq in plan.decodes], dtype=np.int64)
        slots, starts = self._last_slots, np.array(plan.starts, dtype=np.int64)
        apart = self.decodes is not None and not (plan.chunks and self._joined(plan))
        ready = self.at[slots] == (starts if apart else -2)
        self.at[slots] = starts + 1
        self._tables.write([*plan.admitted, *plan.grown])
        flight = InFlight(plan, [], self._clock.next())
        places, chunks, where = self._places[: len(slots)], plan.chunks, []
        if np.count_nonzero(ready) < len(slots):
            places, where = np.flatnonzero(ready), np.flatnonzero(~ready).tolist()
            chunks = [Scheduled(plan.decodes[place], plan.starts[place], 1, True) for place in where] + chunks
            slots = slots[ready]
        if len(places):
            self._decode(flight, places, slots, starts[ready])
        place = len(plan.decodes)
        for seq, start, count, samples in plan.chunks:
            assert seq.slot is not None
            self.at[seq.slot] = start + count if samples else -1
            where.append(place if samples else -1)
            place += samples
        seqs = self.prefills.seqs_of(sum(chunk.count for chunk in chunks), len(chunks)) if chunks else 1
        assert len(chunks) <= seqs or not any(one.waits for one in chunks), "the next graph takes their logits"
        for first in range(0, len(chunks), seqs):  # all tokens of a step fit the largest bucket
            group = slice(first, first + seqs)
            before = first - (len(chunks) - len(plan.chunks))
            scored = [one._replace(chunk=one.chunk - before) for one in plan.scored
                      if before <= one.chunk < before + seqs]  # fmt: skip
            self._prefill(flight, chunks[group], np.array(where[group]), scored)
        if not flight.rest:
            flight.span.end()
        return flight

    def _joined(self, plan: StepPlan) -> bool:
        """Whether decodes and chunks are computed by one graph."""
        seqs = len(plan.decodes) + len(plan.chunks)
        return seqs <= self.prefills.seqs_of(plan.num_tokens) and max(plan.starts, default=0) < _LONGEST_JOINED

    def _decode(self, flight: InFlight, places: np.ndarray, rows: np.ndarray, starts: np.ndarray) -> None:
        """rows, starts int64 [len(places)]: slots of the decodes at these places of the plan, and what they compute."""
        assert self.decodes is not None
        count, plan = len(rows), flight.plan
        bucket = fitting(self.decodes.buckets, count)
        if len(self._last_rows) != count or (rows != self._last_rows).any():
            self._last_rows = rows
            host = self._rows.turn()["rows"]
            host[:count] = rows
            host[count:] = self.state.dump
            self._rows.send()
            self.decodes.rows.copy_(self._rows.device["rows"], non_blocking=True)
        edited = self.late.rules.edited
        ruled = bool(edited) and not edited.isdisjoint(rows.tolist())
        graph = self.decodes.get(bucket, fitting(self.decodes.lengths, int(starts.max()) + 1), ruled)
        flight.span.begin()
        graph.replay()
        late = [LateRow(row, Scheduled(plan.decodes[place], plan.starts[place], 1, True)) for row, place in enumerate(places)
                if plan.decodes[place].slot in self.late.slots] if self.late.slots else []  # fmt: skip
        flight.parts.append(Chosen(places, rows, starts + 1, self._chosen))
        if late:
            self.late.sample(flight, places, late, self.decodes.chain.logits)

    def _prefill(self, flight: InFlight, entries: list[Scheduled], places: np.ndarray, scored: list[Scored]) -> None:
        """scored: of these entries, by their numbers here. A graph gives no hidden states, so then the ops are launched."""
        work = Chunks.of(entries)
        bucket = self.prefills.get(fitting(self.prefills.buckets, int(work.ends[-1])))
        work.fill(bucket.packed.turn(), self.page_size, self.prefills.block, self.state.dump)
        bucket.packed.send()
        assert bucket.graph is not None
        flight.span.begin()
        if scored:
            begins = work.ends - work.counts
            rows = np.concatenate([one.rows(int(work.starts[one.chunk]), int(begins[one.chunk])) for one in scored])
            hidden = self.prefills.compute_with_hidden(bucket, sent(torch.from_numpy(rows), self.device))
            flight.scores.append(self.scorer.score(hidden, scored))
        else:
            bucket.graph.replay()
        late = [LateRow(row, entry) for row, entry in enumerate(entries) if entry.samples and entry.seq.slot in self.late.slots]
        flight.parts.append(Chosen(places, work.slots, work.starts + work.counts, self._chosen))
        if late:
            self.late.sample(flight, places, late, bucket.logits)

    def calibrate(self, mode: Mode, before: Callable[[], object] = int) -> None:
        """Decode by what was measured on this kind of machine, or is measured now, after a call of `before`. Before warm_up."""
        if self.decodes is None:
            return
        decodes = self.decodes
        found = measured_choices(decodes.chain, decodes.buckets, mode, Steps(), workers=_workers(), before=before)
        for rows, measured in found.items():
            decodes.tiles[rows] = measured.tiles
            decodes.chain.reserve(rows, measured.tiles)
        self.measured = found

    def _compile_ahead(self) -> None:
        """Where Triton's cache is cold, let all cores compile what warm_up is about to launch."""
        if self.decodes is None or self.device.type != "cuda":
            return
        decodes, chosen = self.decodes, self.decodes.kinds()
        jobs: list[Any] = [
            partial(decodes.chain.launch, decodes.rows[:rows], tiles, longest=longest)
            for (_, tiles), rows in chosen.items() for longest in decodes.lengths[:2]
        ]
        jobs.append(self.late.kernels(1, self.prefills.logits))
        jobs.append(partial(_prefill_once, self.model, self.ops, self.kv, self.state, self.prefills.buckets[0]))
        known = [facts(decodes.chain, decodes.buckets), [str(one) for one in chosen], self.max_pages, self.ops.overrides]
        compile_ahead(jobs, _workers(), stamp=digest(known))

    def warm_up(self, max_tokens: int, timed: Timed = untimed) -> None:
        """Compile every kernel that serving can reach, and capture the graphs of one sequence; others follow when idle."""
        with timed("compile"):
            self._compile_ahead()
        with timed("decode kernels"):
            if self.decodes is not None:
                self.decodes.compute_kinds()
        with timed("prefill kernels"):
            for tokens in self.prefills.compiling:
                self.prefills.compute(self.prefills.get(tokens, capture=False))
        with timed("sampler"):
            self.late.compute(self.prefills.logits)
        with timed("graphs"):
            if self.decodes is not None:
                self.decodes.get(self.decodes.buckets[0], self.decodes.lengths[0])
            while self.capture_at_start and self.unprepared:
                self.prepare()
            if self.device.type == "cuda":
                torch.cuda.synchronize()

    @property
    def unprepared(self) -> int:
        """Graphs that are not captured yet; 129 are counted in 8 us."""
        return len(list(self.prefills.missing())) + (0 if self.decodes is None else len(list(self.decodes.missing())))

    def prepare(self) -> None:
        """Capture the likeliest graph that is missing."""
        if self.decodes is not None and (key := next(iter(self.decodes.missing()), None)) is not None:
            self.decodes.get(*key)
        elif (tokens := next(iter(self.prefills.missing()), None)) is not None:
            self.prefills.get(tokens)

    def explain(self) -> list[dict[str, Any]]:
        rows = []
        if self.decodes is not None:
            low, config, buckets = 1, self.model.config, self.decodes.buckets
            for size, following in zip(buckets, [*buckets[1:], None], strict=True):
                tiles, measured = self.decodes.tiles[size], self.measured.get(size)
                if following and (self.decodes.tiles[following], self.measured.get(following)) == (tiles, measured):
                    continue  # one row of the table for buckets that do the same
                rows += [explain_row(op, low, size, tiles, measured, config, self.model.dtype) for op in CHOICES]
                low = size + 1
        for row in self.ops.explain():
            rows.append({**row, "op": f"prefill {row['op']}", "reason": "captured graph: a launch costs no host time"})
        return rows


def _prefill_once(model: Llama, ops: Ops, kv: KVCache, state: DecodeState, tokens: int) -> None:
    """In a compiling process: what a prefill graph launches."""
    prefills = PrefillGraphs(model, ops, kv, state, [tokens], GraphPool(model.embed.device), seqs=1, narrow=1)
    prefills.compute(prefills.get(tokens, capture=False))


def _workers() -> int:
    """Processes that may compile at the same time."""
    return min(cores(), available_host_memory() // WORKER_BYTES)
