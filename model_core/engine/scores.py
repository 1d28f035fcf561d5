"""Log-probabilities of prompt tokens. All logits of a prompt would be gigabytes, so they are made a few rows at a time."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from model_core.engine.plan import Scored
from model_core.engine.request import PromptLogprobs
from model_core.engine.sequence import Sequence
from model_core.model.llama import Llama

_MOST_LOGITS = 8 << 20  # of a piece: beyond them a product gains nothing by more rows


@dataclass(frozen=True)
class Scores:
    """Results of one step for `scored`, one row after another; on the host once the step is done.

    own: float32 [n]; ranks: int32 [n]; top_ids: int32 [n, k]; top_logprobs: float32 [n, k].
    """

    scored: list[Scored]
    own: torch.Tensor
    ranks: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor

    def __iter__(self) -> Iterator[tuple[Sequence, PromptLogprobs | None]]:
        """Of each part, in order; None where logits were not finite."""
        at = 0
        for seq, _, _, count in self.scored:
            part, at = slice(at, at + count), at + count
            k = seq.request.params.prompt_logprobs or 0
            own = self.own[part].numpy()
            yield seq, None if not np.isfinite(own).all() else PromptLogprobs(
                k, array("f", own.tobytes()), array("i", self.ranks[part].numpy().tobytes()),
                array("i", self.top_ids[part, :k].numpy().tobytes()),
                array("f", self.top_logprobs[part, :k].numpy().tobytes()))  # fmt: skip


class Scorer:
    """Makes no more logits at a time than sampling may use (engine/memory.py): those of max_seqs rows, 53 bytes each; here a
    logit takes 20, itself in two dtypes, its log-probability, and what ranks and the best take."""

    def __init__(self, model: Llama, max_seqs: int) -> None:
        self._model = model
        most = max(1, _MOST_LOGITS // model.config.vocab_size)
        # what a softmax rounds may depend on the number of rows
        self._rows = 1 if model.invariant else min(2 * max_seqs, most)

    @torch.inference_mode()
    def score(self, hidden: torch.Tensor, scored: list[Scored]) -> Scores:
        """hidden: [n, hidden], of the rows of `scored`, in order."""
        following = [token for one in scored for token in one.seq.tokens[one.start + 1 : one.start + 1 + one.count]]
        tokens = sent(torch.tensor(following), hidden.device)[:, None]
        k = max(one.seq.request.params.prompt_logprobs or 0 for one in scored)
        pieces = [self._piece(*part, k) for part in zip(hidden.split(self._rows), tokens.split(self._rows), strict=True)]
        return Scores(scored, *(copied(torch.cat(parts)) for parts in zip(*pieces, strict=True)))

    def _piece(self, hidden: torch.Tensor, tokens: torch.Tensor, k: int) -> tuple[torch.Tensor, ...]:
        logits = self._model.logits(hidden)
        ranks = (logits > logits.gather(1, tokens)).sum(-1, dtype=torch.int32) + 1
        logprobs = torch.log_softmax(logits, dim=-1)
        top, ids = logprobs.topk(max(1, k), dim=-1)
        return logprobs.gather(1, tokens).squeeze(1), ranks, ids.to(torch.int32), top


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on the device, soon; it may be dropped here."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A device tensor in pinned memory, once the step is done."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
