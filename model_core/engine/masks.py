"""Which tokens the grammars of a step's rows allow next."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from model_core.engine.plan import Scheduled
from model_core.engine.sequence import Sequence

if TYPE_CHECKING:
    from model_core.grammar.batch import MaskFiller
    from model_core.grammar.matcher import Matcher


class RowMasks:
    """Masks of rows, int32 [words] each, a bit per token id, lowest first. One that does not come in time allows nothing, and
    its sequence `sits_out`."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.words = -(-vocab_size // 32)
        self._device = device

    @cached_property
    def _filler(self) -> MaskFiller:
        from model_core.grammar.batch import MaskFiller  # not loaded before there is a grammar

        return MaskFiller()

    def begin(self, entries: list[Scheduled]) -> None:
        """Let masks that may take long be filled while their step is computed."""
        slow = [entry.seq for entry in entries
                if entry.seq.matcher is not None and entry.seq.matcher.compiled.slow and not entry.waits]  # fmt: skip
        if slow:
            self._filler.begin(*_asked(slow))

    def fill(self, seqs: list[Sequence], masks: np.ndarray, rows: list[int] | None = None) -> None:
        """Write row i, or rows[i], of int32 [rows, words] for a sequence with a grammar."""
        self._filler.fill(*_asked(seqs), masks, rows)

    def of(self, entries: list[Scheduled]) -> torch.Tensor | None:
        """[len(entries), words] on the device, as `Sampler.sample` takes it; None if no sequence has a grammar."""
        rows = [row for row, entry in enumerate(entries) if entry.seq.matcher is not None]
        if not rows:
            return None
        masks = torch.full((len(entries), self.words), -1, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        live = [row for row in rows if entries[row].seq.finish is None]  # one that has ended may have no next token
        if live:
            self.fill([entries[row].seq for row in live], masks.numpy(), live)
        return masks.to(self._device, non_blocking=True)


def _asked(seqs: list[Sequence]) -> tuple[list[Matcher], list[tuple[list[int], int]]]:
    """Of sequences with a grammar: what follows it, and what it has to read."""
    return [seq.matcher for seq in seqs if seq.matcher is not None], [(seq.tokens, seq.num_prompt) for seq in seqs]
