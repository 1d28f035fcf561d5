"""The runner of a GPU: a step is one decode graph, and a prefill graph where prompts are computed, on the same stream.

Decodes have a graph to themselves, whatever prompts ride along: their kernels, and so their bits, are the same in every step.
The price is that a mixed step reads the weights twice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from model_core.dispatch.calibrate import Steps
from model_core.dispatch.compile import WORKER_BYTES, compile_ahead, cores
from model_core.dispatch.measured import Measured, explain_row, with_products
from model_core.dispatch.ops import Ops
from model_core.dispatch.store import Mode, digest, facts, measured_choices
from model_core.dispatch.tiles import PRODUCTS, StepTiles, default_split, default_tiles
from model_core.engine.graphs import PREFILL_SEQS, DecodeGraphs, GraphPool, PrefillGraphs, fitting, row_buckets, token_buckets
from model_core.engine.memory import available_host_memory
from model_core.engine.packed import Packed
from model_core.engine.plan import Limits, Scheduled, StepPlan
from model_core.engine.rules import SlotRules
from model_core.engine.runner import EVERY_SAMPLER_STEP, InFlight, Part, forbidden_in, record_event, to_host
from model_core.engine.sampler import Sampled, Sampler, divisor
from model_core.engine.startup import Timed, untimed
from model_core.kernels.decode.attention import SplitTiles
from model_core.kernels.decode.state import DecodeState
from model_core.model.batch import blocks_of
from model_core.model.decode import DecodeChain, why_unsupported
from model_core.model.kv import KVCache
from model_core.model.llama import Llama

_UPDATES = 4096  # entries of block tables that one copy brings to the device


class GraphRunner:
    """All state per slot lives on the device; the host keeps mirrors of what it must know.

    table_len[slot]: entries of the slot's block table that the device has. at[slot]: position of the slot's newest token, which
    only the device need know, or -1 while the slot's prompt is not computed to its end. A sequence is decoded by the
    decode graph if `at` is where it should be; otherwise its next token is a chunk like any other.
    """

    def __init__(self, model: Llama, ops: Ops, kv: KVCache, limits: Limits, page_size: int, device: torch.device, *,
                 pdl: bool = True, capture_at_start: bool = False, tiles: dict[int, StepTiles] | None = None,
                 split: SplitTiles | None = None) -> None:  # fmt: skip
        self.model, self.kv, self.page_size, self.device = model, kv, page_size, device
        self.capture_at_start, self.ops, self._pin = capture_at_start, ops, device.type == "cuda"
        self.sampler = Sampler(limits.max_seqs, model.config.vocab_size, device)
        self.max_pages = -(-limits.max_context // page_size)
        self.state = DecodeState.empty(limits.max_seqs, self.max_pages, device, self.sampler.counts)
        self.rules = SlotRules(self.state, model.config.vocab_size)
        self.table_len = [0] * limits.max_seqs
        self.at = [-1] * limits.max_seqs
        self.special: set[int] = set()  # slots whose requests the graphs cannot sample for
        pool = GraphPool(device)
        # decode kernels add in other orders than those of prompts, so an invariant model decodes by chunks of one token
        self.why_unfused = "deterministic" if model.invariant else why_unsupported(model.config, model.dtype)
        self.measured: dict[int, Measured] = {}
        self.decodes: DecodeGraphs | None = None
        if self.why_unfused is None:
            config = model.config
            tiles = tiles or {rows: default_tiles(config, rows, model.dtype) for rows in row_buckets(limits.max_seqs)}
            split = split or default_split(config)
            chain = DecodeChain(model, kv, self.state, limits.max_seqs, split, pdl=None if pdl else False)
            self.decodes = DecodeGraphs(chain, tiles, limits.max_context, pool)
        seqs = PREFILL_SEQS if self.decodes else limits.max_seqs
        self.prefills = PrefillGraphs(model, ops, kv, self.state, token_buckets(limits.max_batch_tokens), pool, seqs=seqs)
        self._rows = Packed([("rows", limits.max_seqs, "int64")], device)
        self._last_rows = np.zeros(0, dtype=np.int64)
        self._updates = Packed([("where", _UPDATES, "int64"), ("page", _UPDATES, "int32")], device)
        self._outs = [torch.zeros(limits.max_seqs, dtype=torch.int64, pin_memory=self._pin) for _ in range(4)]
        self._out = 0

    def launch(self, plan: StepPlan, proceed: Callable[[], object] = int) -> InFlight:
        for seq in plan.admitted:
            assert seq.slot is not None and seq.request.params.seed is not None
            self.table_len[seq.slot], self.at[seq.slot] = 0, -1
            self.special.discard(seq.slot)
            if not self.rules.assign(seq):
                self.special.add(seq.slot)
                self.sampler.assign(seq.slot, seq.request.params, seq.request.params.seed, seq.tokens, seq.num_prompt)
        decodes, chunks = [], []
        for entry in plan.entries:
            slot = entry.seq.slot
            assert slot is not None
            if entry.count == 1 and self.at[slot] == entry.start and self.decodes is not None:
                decodes.append(entry)
                self.at[slot] += 1
            else:
                chunks.append(entry)
                self.at[slot] = entry.start + entry.count if entry.samples else -1
        self._write_tables(plan.entries)
        parts: list[Part] = []
        if decodes:
            self._decode(decodes, parts)
        for first in range(0, len(chunks), self.prefills.seqs):  # all tokens of a step fit the largest bucket
            self._prefill(chunks[first : first + self.prefills.seqs], parts)
        return InFlight(plan, parts, record_event(self.device))

    def _decode(self, entries: list[Scheduled], parts: list[Part]) -> None:
        assert self.decodes is not None
        count = len(entries)
        rows = np.fromiter((entry.seq.slot for entry in entries), dtype=np.int64, count=count)
        bucket = fitting(self.decodes.buckets, count)
        if len(self._last_rows) != count or (rows != self._last_rows).any():
            self._last_rows = rows
            host = self._rows.turn()["rows"]
            host[:count] = rows
            host[count:] = self.state.dump
            self._rows.send()
            self.decodes.rows.copy_(self._rows.device["rows"], non_blocking=True)
        longest = fitting(self.decodes.lengths, max(entry.start for entry in entries) + 1)
        self.decodes.get(bucket, longest).replay()
        self._sampled(entries, self.decodes.chain.logits, self.decodes.out, self._next_out(), parts)

    def _prefill(self, entries: list[Scheduled], parts: list[Part]) -> None:
        size, dump = self.page_size, self.state.dump
        counts = np.array([entry.count for entry in entries], dtype=np.int32)
        starts = np.array([entry.start for entry in entries], dtype=np.int32)
        slots = np.array([entry.seq.slot for entry in entries], dtype=np.int32)
        ends = counts.cumsum()
        total, seqs = int(ends[-1]), len(entries)
        bucket = self.prefills.get(fitting(self.prefills.buckets, total))
        h = bucket.packed.turn()
        h["positions"][:total] = np.arange(total, dtype=np.int32) - np.repeat(ends - counts - starts, counts)
        at = 0
        for (seq, start, count, _), slot in zip(entries, slots.tolist(), strict=True):
            known = seq.tokens[start : start + count]
            h["token_ids"][at : at + len(known)] = known
            if len(known) < count:  # sampled by a step in flight: only the device knows it
                h["token_ids"][at + len(known)] = -1 - slot
            pages = np.array(seq.block_table[start // size : -(-(start + count) // size)], dtype=np.int64)
            offsets = np.arange(start, start + count) - start // size * size
            h["slot_mapping"][at : at + count] = pages[offsets // size] * size + offsets % size
            at += count
        for name in ("token_ids", "positions", "slot_mapping"):
            h[name][total:] = 0  # padding writes to the dump page
        h["query_start"][: seqs + 1] = [0, *ends]
        h["query_start"][seqs + 1 :] = total
        h["context_len"][:seqs] = starts + counts
        h["context_len"][seqs:] = 1
        h["slots"][:seqs] = slots
        h["slots"][seqs:] = dump
        h["sample_slots"][:] = dump
        h["sample_slots"][:seqs] = [slot if entry.samples else dump for entry, slot in zip(entries, slots, strict=True)]
        h["logit_rows"][:seqs] = ends - 1
        h["logit_rows"][seqs:] = 0
        h["temperature"][:seqs] = [divisor(entry.seq.request.params.temperature) for entry in entries]
        h["temperature"][seqs:] = 0.0
        h["seed"][:seqs] = [entry.seq.request.params.seed for entry in entries]
        blocks = np.array(blocks_of(counts.tolist(), self.prefills.block), dtype=np.int32).ravel()
        h["blocks"][: len(blocks)] = blocks
        h["blocks"][len(blocks) :] = -1
        bucket.packed.send()
        assert bucket.graph is not None
        bucket.graph.replay()
        host = torch.empty(seqs, dtype=torch.int64, pin_memory=self._pin)
        self._sampled(entries, bucket.logits, bucket.out, host, parts)

    def _sampled(self, entries: list[Scheduled], logits: torch.Tensor, out: torch.Tensor, host: torch.Tensor,
                 parts: list[Part]) -> None:  # fmt: skip
        """Bring a graph's tokens to the host. Rows that ask for log-probabilities are sampled again, op by op."""
        count = len(entries)
        parts.append(Part(entries, Sampled(host[:count].copy_(out[:count], non_blocking=True))))
        special = [(row, entry) for row, entry in enumerate(entries) if entry.samples and entry.seq.slot in self.special]
        # torch may divide its sums by the number of rows
        for group in [[one] for one in special] if self.model.invariant else [special] * bool(special):
            self._sample_again(group, logits, parts)

    def _sample_again(self, special: list[tuple[int, Scheduled]], logits: torch.Tensor, parts: list[Part]) -> None:
        rows, chosen = [row for row, _ in special], [entry for _, entry in special]
        slots = self._send([entry.seq.slot for entry in chosen])
        positions = self._send([entry.start + entry.count for entry in chosen])
        params = [entry.seq.request.params for entry in chosen]
        sampled = self.sampler.sample(logits[self._send(rows)], slots, positions, params, forbidden_in(chosen))
        self.state.last_token[slots] = sampled.tokens.clamp(min=0)
        parts.append(Part(chosen, to_host(sampled)))

    def _write_tables(self, entries: list[Scheduled]) -> None:
        """Bring the device's block tables up to date with the sequences'."""
        where: list[int] = []
        pages: list[int] = []
        for seq, *_ in entries:
            slot, table = seq.slot, seq.block_table
            assert slot is not None
            have = self.table_len[slot]
            if have < len(table):
                base = slot * self.max_pages
                where += range(base + have, base + len(table))
                pages += table[have:]
                self.table_len[slot] = len(table)
        flat = self.state.block_tables.view(-1)
        for first in range(0, len(where), _UPDATES):
            count = min(_UPDATES, len(where) - first)
            host = self._updates.turn()
            host["where"][:count] = where[first : first + count]
            host["page"][:count] = pages[first : first + count]
            self._updates.send()
            flat.index_copy_(0, self._updates.device["where"][:count], self._updates.device["page"][:count])

    def _next_out(self) -> torch.Tensor:
        self._out = (self._out + 1) % len(self._outs)
        return self._outs[self._out]

    def _send(self, values: list[Any]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, pin_memory=self._pin).to(self.device, non_blocking=True)

    def calibrate(self, mode: Mode, before: Callable[[], object] = int) -> None:
        """Decode by what was measured on this kind of machine, or is measured now, after a call of `before`. Before warm_up."""
        if self.decodes is None:
            return
        decodes = self.decodes
        found = measured_choices(decodes.chain, decodes.buckets, mode, Steps(), workers=_workers(), before=before)
        for rows, measured in found.items():
            decodes.tiles[rows] = with_products(decodes.tiles[rows], {op: getattr(measured.tiles, op) for op in PRODUCTS})
            decodes.chain.reserve(rows, decodes.tiles[rows])
        self.measured = found

    def _compile_ahead(self) -> None:
        """Where Triton's cache is cold, let all cores compile what warm_up is about to launch."""
        if self.decodes is None or self.device.type != "cuda":
            return
        decodes, chosen = self.decodes, self.decodes.kinds()
        jobs: list[Any] = [
            partial(decodes.chain.launch, decodes.rows[:rows], decodes.out[:rows], tiles, longest=decodes.lengths[0])
            for (_, tiles), rows in chosen.items()
        ]
        jobs.append(partial(_prefill_once, self.model, self.ops, self.kv, self.state, self.prefills.buckets[0]))
        known = [facts(decodes.chain, decodes.buckets), [str(one) for one in chosen], self.max_pages, self.ops.overrides,
                 str(decodes.chain.split)]  # fmt: skip
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
            slots = torch.zeros(1, dtype=torch.int64, device=self.device)
            for params in EVERY_SAMPLER_STEP:
                self.sampler.sample(self.prefills.logits[:1].clone(), slots, slots, [params], [])
        with timed("graphs"):
            if self.decodes is not None:
                self.decodes.get(self.decodes.buckets[0], self.decodes.lengths[0])
            while self.capture_at_start and self.prepare():
                pass
            if self.device.type == "cuda":
                torch.cuda.synchronize()

    def prepare(self) -> bool:
        if self.decodes is not None and (key := next(iter(self.decodes.missing()), None)) is not None:
            self.decodes.get(*key)
            return True
        if (tokens := next(iter(self.prefills.missing()), None)) is not None:
            self.prefills.get(tokens)
            return True
        return False

    def explain(self) -> list[dict[str, Any]]:
        rows = []
        if self.decodes is not None:
            low, config, buckets = 1, self.model.config, self.decodes.buckets
            for size, following in zip(buckets, [*buckets[1:], None], strict=True):
                tiles, measured = self.decodes.tiles[size], self.measured.get(size)
                if following and (self.decodes.tiles[following], self.measured.get(following)) == (tiles, measured):
                    continue  # one row of the table for buckets that do the same
                rows += [explain_row(op, low, size, tiles, measured, config, self.model.dtype) for op in PRODUCTS]
                attention = str(self.decodes.chain.split)
                rows.append({**rows[-1], "op": "decode attention", "candidates": {attention: None}, "choice": attention,
                             "reason": "default, not measured"})  # fmt: skip
                low = size + 1
        for row in self.ops.explain():
            rows.append({**row, "op": f"prefill {row['op']}", "reason": "captured graph: a launch costs no host time"})
        return rows


def _prefill_once(model: Llama, ops: Ops, kv: KVCache, state: DecodeState, tokens: int) -> None:
    """In a compiling process: what a prefill graph launches."""
    prefills = PrefillGraphs(model, ops, kv, state, [tokens], GraphPool(model.embed.device))
    prefills.compute(prefills.get(tokens, capture=False))


def _workers() -> int:
    """Processes that may compile at the same time."""
    return min(cores(), available_host_memory() // WORKER_BYTES)
