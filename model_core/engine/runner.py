"""The runner: a step plan becomes tensors, the model runs, and the sampled tokens come back when they are there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from model_core.engine.clock import Clock
from model_core.engine.flight import InFlight, Part
from model_core.engine.masks import RowMasks
from model_core.engine.plan import Limits, Scheduled, StepPlan
from model_core.engine.request import SamplingParams
from model_core.engine.sampler import Sampled, Sampler
from model_core.engine.scores import Scorer, sent
from model_core.model.batch import Batch
from model_core.model.kv import KVCache
from model_core.model.llama import Llama


class StepRunner(Protocol):
    """What the engine needs of a runner."""

    model: Llama
    kv: KVCache
    page_size: int

    def launch(self, plan: StepPlan, proceed: Callable[[], object] = int) -> InFlight:
        """Enqueue one step on the device; on the CPU, compute it, and call `proceed` before each layer: what it raises comes
        out."""
        ...

    def warm_up(self, max_tokens: int) -> None:
        """Compile and allocate what serving will need."""
        ...

    @property
    def unprepared(self) -> int:
        """Bits of work that can be done before they are needed. Any thread may ask."""
        ...

    def prepare(self) -> None:
        """Do one of them, if there is one. Called while the engine is quiet."""
        ...

    def explain(self) -> list[dict[str, Any]]:
        """Which implementation runs for which op and shape, and why: rows for a table."""
        ...


class Runner:
    """Everything on the device: model, KV pages, block tables and sampling state per slot.

    Mirrors per slot, on the host: the block table row as far as it was copied. On the device: the last sampled token,
    so that a step can be launched before the host has read the tokens of the step before.
    """

    def __init__(self, model: Llama, kv: KVCache, limits: Limits, page_size: int, device: torch.device) -> None:
        self.model, self.kv, self.page_size, self.device = model, kv, page_size, device
        self.sampler = Sampler(limits.max_seqs, model.config.vocab_size, device)
        self.masks = RowMasks(model.config.vocab_size, device)
        self.scorer = Scorer(model, limits.max_seqs)
        self.max_pages = -(-limits.max_context // page_size)
        self.tables = np.zeros((limits.max_seqs, self.max_pages), dtype=np.int32)
        self.table_len = [0] * limits.max_seqs
        self.last_token = torch.zeros(limits.max_seqs, dtype=torch.int64, device=device)
        self._clock = Clock(device)

    def launch(self, plan: StepPlan, proceed: Callable[[], object] = int) -> InFlight:
        for seq in plan.admitted:
            assert seq.slot is not None and seq.request.params.seed is not None
            self.table_len[seq.slot] = 0
            self.sampler.assign(seq.slot, seq.request.params, seq.request.params.seed, seq.tokens, seq.num_prompt)
        rows = [entry for entry in plan.entries if entry.samples]
        self.masks.begin(rows)
        span = self._clock.next()
        span.begin()
        hidden = self.model.hidden_states(self._batch(plan), self.kv, proceed=proceed)
        logits = self.model.logits(hidden[: len(rows)])
        # what sampling rounds may depend on the number of rows, and on where a row lies
        groups = sampled_together(len(rows), self.model.invariant)
        places = np.arange(len(rows))
        scores = [self.scorer.score(hidden[len(rows) :], plan.scored)] if plan.scored else []
        flight = InFlight(plan, [], span, scores)

        def sample() -> None:
            masks = self.masks.of(rows)
            for group in groups:
                sampled = self._sample(rows[group], logits[group].clone(), None if masks is None else masks[group])
                flight.parts.append(Part.of(places[group], sampled))

        flight.rest.append(sample)
        if not any(entry.waits for entry in rows):
            flight.finish()
        return flight

    @property
    def unprepared(self) -> int:
        return 0

    def prepare(self) -> None:
        """Nothing is captured here."""

    def explain(self) -> list[dict[str, Any]]:
        return self.model.ops.explain()

    def _sample(self, rows: list[Scheduled], logits: torch.Tensor, masks: torch.Tensor | None) -> Sampled:
        slots = self._send(np.array([entry.seq.slot for entry in rows], dtype=np.int64))
        positions = self._send(np.array([entry.start + entry.count for entry in rows], dtype=np.int64))
        params = [entry.seq.request.params for entry in rows]
        sampled = self.sampler.sample(logits, slots, positions, params, forbidden_in(rows), masks)
        self.last_token[slots] = sampled.tokens.clamp(min=0)
        return sampled

    def _batch(self, plan: StepPlan) -> Batch:
        entries, size = plan.entries, self.page_size
        counts = np.array([entry.count for entry in entries], dtype=np.int32)
        starts = np.array([entry.start for entry in entries], dtype=np.int64)
        ends = counts.cumsum(dtype=np.int64)
        slots = np.array([self._mirror(entry) for entry in entries], dtype=np.int64)
        token_slots = np.repeat(slots, counts)
        positions = np.arange(plan.num_tokens, dtype=np.int64) - np.repeat(ends - counts - starts, counts)
        pages = self.tables[token_slots, positions // size].astype(np.int64)
        tokens: list[int] = []
        unknown = False
        for seq, start, count, _ in entries:
            if start + count <= len(seq.tokens):
                tokens += seq.tokens[start:start + count]
            else:  # sampled by a step in flight: only the device knows it
                tokens.append(-1)
                unknown = True
        token_ids = self._send(np.array(tokens, dtype=np.int64))
        if unknown:
            token_ids = torch.where(token_ids < 0, self.last_token[self._send(token_slots)], token_ids)
        context = starts + counts
        longest = -(-int(context.max()) // size)
        samples = np.array([entry.samples for entry in entries])
        scored = [one.rows(*(int(of[plan.num_decodes + one.chunk]) for of in (starts, ends - counts))) for one in plan.scored]
        return Batch(
            token_ids=token_ids,
            positions=self._send(positions),
            slot_mapping=self._send(pages * size + positions % size),
            query_start=self._send(np.concatenate(([0], ends)).astype(np.int32)),
            context_len=self._send(context.astype(np.int32)),
            block_tables=self._send(self.tables[slots, :longest]),
            logit_rows=self._send(np.concatenate([(ends - 1)[samples], *scored]).astype(np.int64)),
            query_lens=counts.tolist(),
            context_lens=context.tolist(),
            num_decodes=0 if self.model.invariant else plan.num_decodes,  # a decode is a chunk like any other, see attention
        )

    def _mirror(self, entry: Scheduled) -> int:
        """Bring the block table row of an entry's slot up to date; returns the slot."""
        seq, slot = entry.seq, entry.seq.slot
        assert slot is not None
        have, want = self.table_len[slot], len(seq.block_table)
        if have < want:
            self.tables[slot, have:want] = seq.block_table[have:]
            self.table_len[slot] = want
        return slot

    def _send(self, array: np.ndarray) -> torch.Tensor:
        return sent(torch.from_numpy(np.ascontiguousarray(array)), self.device)

    def warm_up(self, max_tokens: int) -> None:
        """Run steps on the dump page that reach every kernel the dispatch rule can choose, and the whole sampler.

        Serving then compiles nothing: kernels are specialised on the model's shapes, not on a batch's. (On an H100 the
        first request waited 2.9 s for them when only one prefill and one decode were run here.)
        """
        if self.device.type == "cpu":  # nothing is compiled there; a short step makes threads and buffers
            self.model.forward(self._dummy((1, 8), (1, 8)), self.kv)
            return
        longest = self.max_pages * self.page_size
        # (query lengths, context lengths): a prefill, single decodes of a short and a long context, all kinds mixed;
        # each on both sides of the dispatch rule's threshold.
        for chunk in (min(max_tokens, longest, 160), 8):
            for queries, contexts in (((chunk,), (chunk,)), ((1,), (1,)), ((1,), (longest,)), ((1, 1), (longest, 1)),
                                      ((1, 1, chunk), (1, longest, longest))):
                logits = self.model.forward(self._dummy(queries, contexts), self.kv)
        sample_every_way(self.sampler, logits)
        torch.cuda.synchronize()

    def _dummy(self, queries: tuple[int, ...], contexts: tuple[int, ...]) -> Batch:
        tokens, size = sum(queries), self.page_size
        ends = np.cumsum(queries)
        return Batch(
            token_ids=self._send(np.zeros(tokens, dtype=np.int64)),
            positions=self._send(np.concatenate([np.arange(c - q, c) for q, c in zip(queries, contexts, strict=True)])),
            slot_mapping=self._send(np.arange(tokens) % size),
            query_start=self._send(np.concatenate(([0], ends)).astype(np.int32)),
            context_len=self._send(np.array(contexts, dtype=np.int32)),
            block_tables=self._send(np.zeros((len(queries), -(-max(contexts) // size)), dtype=np.int32)),
            logit_rows=self._send(ends - 1),
            query_lens=list(queries),
            context_lens=list(contexts),
            num_decodes=0 if self.model.invariant else sum(query == 1 for query in queries),
        )


def sampled_together(count: int, invariant: bool) -> list[slice]:
    """Groups of `count` rows; each alone where its bits must not depend on others: torch may divide sums by their number."""
    return [slice(row, row + 1) for row in range(count)] if invariant else [slice(None)] * bool(count)


def forbidden_in(rows: list[Scheduled]) -> list[tuple[int, tuple[int, ...]]]:
    """(row, ids) of sequences that may not end yet."""
    found = []
    for row, (seq, start, count, _) in enumerate(rows):
        chosen = start + count - seq.num_prompt  # output tokens before this one
        if chosen < seq.request.params.min_tokens and seq.stop_ids:
            found.append((row, tuple(seq.stop_ids)))
    return found


EVERY_SAMPLER_STEP = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0, top_k=10, top_p=0.9, min_p=0.1, logprobs=20, frequency_penalty=0.1),
    SamplingParams(temperature=1.0, top_k=1000, logprobs=0),
)


def sample_every_way(sampler: Sampler, logits: torch.Tensor) -> None:
    """Reach all that the sampler may launch, with the first row of these logits; nothing advances."""
    slots = torch.zeros(1, dtype=torch.int64, device=sampler.device)
    for params in EVERY_SAMPLER_STEP:
        sampler.sample(logits[:1].clone(), slots, slots, [params], [], sampler.no_masks(1))
