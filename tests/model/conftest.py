"""Drives a tiny random model of any family (tests/conftest.py) without an engine, the way an engine does."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from model_core.dispatch.ops import Ops
from model_core.model.batch import Batch
from model_core.model.kv import KVCache
from model_core.model.llama import Llama
from model_core.weights.checkpoint import open_checkpoint
from model_core.weights.load import load_parameters

PAGE = 8
CONTEXT = 128


@dataclass
class Sequence:
    """Token ids, the pages they live on, and how many are computed."""

    ids: list[int]
    pages: list[int]
    computed: int = 0


@dataclass
class Session:
    """Drives one model the way an engine does. Pages are handed out in a shuffled order; page 0 is never used.

    Every slot starts as 1e30, so a logit is finite and right only if nothing but written slots was read.
    """

    model: Llama
    kv: KVCache
    free: list[int]
    sequences: list[Sequence] = field(default_factory=list)

    @classmethod
    def open(cls, directory: Path, dtype: torch.dtype = torch.float32, kv_dtype: torch.dtype | None = None,
             **options: Any) -> Session:
        checkpoint = open_checkpoint(directory)
        parameters = load_parameters(checkpoint, dtype=dtype, device="cpu")
        model = Llama(checkpoint.config, parameters, Ops("cpu"), CONTEXT, **options)
        kv = KVCache.empty(checkpoint.config, 64, PAGE, kv_dtype or model.dtype, "cpu")
        kv.poison(1e30)
        return cls(model, kv, (torch.randperm(63, generator=torch.Generator().manual_seed(7)) + 1).tolist())

    def add(self, ids: list[int], shared: Sequence | None = None, shared_pages: int = 0) -> Sequence:
        """A sequence, the first pages of which are another's (a prefix hit)."""
        pages = shared.pages[:shared_pages] if shared else []
        sequence = Sequence(list(ids), list(pages), shared_pages * PAGE)
        self.sequences.append(sequence)
        return sequence

    def step(self, work: list[tuple[Sequence, int]]) -> list[torch.Tensor]:
        """Compute the next n tokens of each sequence, all in one batch; logits [n, vocab] per entry of `work`."""
        work_order = sorted(range(len(work)), key=lambda index: work[index][1] != 1)
        ordered = [work[index] for index in work_order]
        ids, positions, slots = [], [], []
        for sequence, count in ordered:
            start, end = sequence.computed, sequence.computed + count
            assert end <= len(sequence.ids)
            while len(sequence.pages) * PAGE < end:
                sequence.pages.append(self.free.pop())
            ids += sequence.ids[start:end]
            positions += range(start, end)
            slots += [sequence.pages[p // PAGE] * PAGE + p % PAGE for p in range(start, end)]
            sequence.computed = end
        lens = [count for _, count in ordered]
        contexts = [sequence.computed for sequence, _ in ordered]
        width = max(len(sequence.pages) for sequence, _ in ordered)
        tables = [sequence.pages + [0] * (width - len(sequence.pages)) for sequence, _ in ordered]
        batch = Batch(
            token_ids=torch.tensor(ids), positions=torch.tensor(positions), slot_mapping=torch.tensor(slots),
            query_start=torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()], dtype=torch.int32),
            context_len=torch.tensor(contexts, dtype=torch.int32), block_tables=torch.tensor(tables, dtype=torch.int32),
            logit_rows=torch.arange(len(ids)), query_lens=lens, context_lens=contexts, num_decodes=lens.count(1))  # fmt: skip
        parts = self.model.forward(batch, self.kv).split(lens)
        results: list[torch.Tensor] = [torch.empty(0)] * len(work)
        for index, part in zip(work_order, parts, strict=True):
            results[index] = part
        return results


@pytest.fixture
def open_session(checkpoint_dirs: dict[str, Path], oracles: dict[str, torch.nn.Module]):
    def open_(family: str, **options: Any) -> Session:
        return Session.open(checkpoint_dirs[family], **options)

    return open_


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread):
    pass
