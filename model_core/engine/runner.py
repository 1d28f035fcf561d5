"""The runner: a step plan becomes tensors, the model runs, and the sampled tokens come back when they are there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from model_core.engine.plan import Limits, Scheduled, StepPlan
from model_core.engine.request import TokenLogprobs
from model_core.engine.sampler import Sampled, Sampler
from model_core.model.batch import Batch
from model_core.model.kv import KVCache
from model_core.model.llama import Llama


@dataclass
class InFlight:
    """A launched step. `collect` waits for the device; nothing before it does."""

    plan: StepPlan
    rows: list[Scheduled]  # the entries that sample, in the order of the sampled rows
    sampled: Sampled | None
    done: torch.cuda.Event | None

    def collect(self) -> tuple[dict[str, int], dict[str, TokenLogprobs]]:
        """Token id (-1: the logits were not finite) and, where asked for, log-probabilities, by request id."""
        if self.done is not None:
            self.done.synchronize()
        if self.sampled is None:
            return {}, {}
        tokens = self.sampled.tokens.tolist()
        ids = [entry.seq.request_id for entry in self.rows]
        logprobs = {entry.seq.request_id: self.sampled.logprobs_of(row, entry.seq.request.params.logprobs)
                    for row, entry in enumerate(self.rows) if entry.seq.request.params.logprobs is not None}
        return dict(zip(ids, tokens, strict=True)), logprobs


class Runner:
    """Everything on the device: model, KV pages, block tables and sampling state per slot.

    Mirrors per slot, on the host: the block table row as far as it was copied. On the device: the last sampled token,
    so that a step can be launched before the host has read the tokens of the step before.
    """

    def __init__(self, model: Llama, kv: KVCache, limits: Limits, page_size: int, device: torch.device) -> None:
        self.model, self.kv, self.page_size, self.device = model, kv, page_size, device
        self.sampler = Sampler(limits.max_seqs, model.config.vocab_size, device)
        self.max_pages = -(-limits.max_context // page_size)
        self.tables = np.zeros((limits.max_seqs, self.max_pages), dtype=np.int32)
        self.table_len = [0] * limits.max_seqs
        self.last_token = torch.zeros(limits.max_seqs, dtype=torch.int64, device=device)

    def launch(self, plan: StepPlan) -> InFlight:
        """Enqueue one step on the device; on the CPU, compute it."""
        for seq in plan.admitted:
            assert seq.slot is not None and seq.request.params.seed is not None
            self.table_len[seq.slot] = 0
            self.sampler.assign(seq.slot, seq.request.params, seq.request.params.seed, seq.tokens, seq.num_prompt)
        rows = [entry for entry in plan.entries if entry.samples]
        logits = self.model.forward(self._batch(plan), self.kv)
        sampled = self._sample(rows, logits) if rows else None
        done = None
        if self.device.type == "cuda":
            if sampled is not None:
                sampled = _to_host(sampled)
            done = torch.cuda.Event()
            done.record()
        return InFlight(plan, rows, sampled, done)

    def _sample(self, rows: list[Scheduled], logits: torch.Tensor) -> Sampled:
        slots = self._send(np.array([entry.seq.slot for entry in rows], dtype=np.int64))
        positions = self._send(np.array([entry.start + entry.count for entry in rows], dtype=np.int64))
        forbidden = []
        for row, (seq, start, count, _) in enumerate(rows):
            chosen = start + count - seq.num_prompt  # output tokens before this one
            if chosen < seq.request.params.min_tokens and seq.stop_ids:
                forbidden.append((row, tuple(seq.stop_ids)))
        sampled = self.sampler.sample(logits, slots, positions, [entry.seq.request.params for entry in rows], forbidden)
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
        return Batch(
            token_ids=token_ids,
            positions=self._send(positions),
            slot_mapping=self._send(pages * size + positions % size),
            query_start=self._send(np.concatenate(([0], ends)).astype(np.int32)),
            context_len=self._send(context.astype(np.int32)),
            block_tables=self._send(self.tables[slots, :longest]),
            logit_rows=self._send((ends - 1)[samples]),
            query_lens=counts.tolist(),
            context_lens=context.tolist(),
            num_decodes=plan.num_decodes,
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
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

    def warm_up(self, prefill: int) -> None:
        """Run a prefill of `prefill` tokens and a decode on the dump page, so that serving compiles nothing anew."""
        for count in (prefill, 1):
            positions = torch.arange(count, device=self.device)
            size = self.page_size
            batch = Batch(
                token_ids=torch.zeros_like(positions), positions=positions, slot_mapping=positions % size,
                query_start=torch.tensor([0, count], dtype=torch.int32, device=self.device),
                context_len=torch.tensor([count], dtype=torch.int32, device=self.device),
                block_tables=torch.zeros((1, -(-count // size)), dtype=torch.int32, device=self.device),
                logit_rows=positions[-1:], query_lens=[count], context_lens=[count], num_decodes=int(count == 1))
            self.model.forward(batch, self.kv)
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _to_host(sampled: Sampled) -> Sampled:
    """Start copying results into pinned memory; they are valid after the step's event."""

    def copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    tokens = copy(sampled.tokens)
    assert tokens is not None
    return Sampled(tokens, copy(sampled.logprob), copy(sampled.top_ids), copy(sampled.top_logprobs))
