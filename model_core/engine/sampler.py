"""Choosing the next tokens on the device, with all per-request state in one table per slot."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from model_core.engine.philox import uniform
from model_core.engine.request import SamplingParams, TokenLogprobs
from model_core.kernels.decode.state import MAX_LOGIT_BIAS

_SMALL_K = 256  # a top-k cut at or below this needs no sort of the vocabulary
_COLDEST = 1e-6  # logits divided by less than this may leave float32; greedy all the same unless they differ by 1e-5


@dataclass
class Sampled:
    """Results of one step, still on the device. `tokens` is -1 where the logits were not finite, and -2 where every token was
    forbidden."""

    tokens: torch.Tensor  # int64 [R]
    logprob: torch.Tensor | None = None  # float32 [R], of the sampled token
    top_ids: torch.Tensor | None = None  # int64 [R, K]
    top_logprobs: torch.Tensor | None = None  # float32 [R, K]

    def logprobs_of(self, row: int, count: int) -> TokenLogprobs:
        """Log-probabilities of one row on the host, with the `count` best tokens."""
        assert self.logprob is not None and self.top_ids is not None and self.top_logprobs is not None
        pairs = zip(self.top_ids[row, :count].tolist(), self.top_logprobs[row, :count].tolist(), strict=True)
        return TokenLogprobs(float(self.logprob[row]), list(pairs))


class Sampler:
    """Per-slot sampling state and the sampling step.

    State tables are device tensors indexed by slot: temperature, top_k, top_p, min_p, penalties, seed, a bias list,
    and `counts` [max_seqs, vocab], which holds 2 * (times generated) + (1 if in the prompt) for the penalties.
    """

    def __init__(self, max_seqs: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size, self.device = vocab_size, device

        def table(fill: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.full((max_seqs,), fill, dtype=dtype, device=device)

        self.temperature, self.top_p, self.min_p = table(1.0), table(1.0), table(0.0)
        self.repetition, self.presence, self.frequency = table(1.0), table(0.0), table(0.0)
        self.top_k, self.seed = table(vocab_size, torch.int64), table(0, torch.int64)
        self.counts = torch.zeros((max_seqs, vocab_size), dtype=torch.int32, device=device)
        self.bias_ids = torch.zeros((max_seqs, MAX_LOGIT_BIAS), dtype=torch.int64, device=device)
        self.bias_values = torch.zeros((max_seqs, MAX_LOGIT_BIAS), dtype=torch.float32, device=device)
        bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)
        self._zeros = (bits & 1) == 0  # bool [256, 8]: which bits of a byte are not set, lowest first

    def assign(self, slot: int, params: SamplingParams, seed: int, tokens: list[int], num_prompt: int) -> None:
        """Fill a slot for a sequence that starts or resumes (after preemption `tokens` holds its output so far)."""
        self.temperature[slot] = divisor(params.temperature)
        self.top_p[slot], self.min_p[slot] = params.top_p, params.min_p
        self.top_k[slot] = params.top_k if 0 < params.top_k < self.vocab_size else self.vocab_size
        self.repetition[slot], self.presence[slot] = params.repetition_penalty, params.presence_penalty
        self.frequency[slot] = params.frequency_penalty
        self.seed[slot] = seed
        if uses_penalties(params):
            self.counts[slot] = torch.from_numpy(count_tokens(tokens, num_prompt, self.vocab_size))
        if params.logit_bias:
            size = len(params.logit_bias)
            self.bias_values[slot].zero_()
            self.bias_ids[slot, :size] = torch.tensor(list(params.logit_bias), dtype=torch.int64)
            self.bias_values[slot, :size] = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor,
               params: list[SamplingParams], forbidden: list[tuple[int, tuple[int, ...]]],
               masks: torch.Tensor | None = None) -> Sampled:
        """Choose one token per row.

        Args:
            logits: float32 [R, vocab]; overwritten.
            slots: int64 [R] on the device.
            positions: int64 [R], the position that the new token will have.
            params: [R] on the host, to leave out what no row asks for. Which steps run never changes a row's result:
                each is the identity for rows that do not use it.
            forbidden: (row, token ids) that may not be chosen: the ends of a sequence before its min_tokens.
            masks: int32 [R, ceil(vocab / 32)] on the device, a bit per token that a row's grammar allows, lowest bit first.
        """
        finite = torch.isfinite(logits.amax(-1)) & torch.isfinite(logits.amin(-1))
        result = Sampled(tokens=slots)
        raw = None
        if any(p.logprobs is not None for p in params):
            raw = torch.log_softmax(logits, dim=-1)
            count = max((p.logprobs for p in params if p.logprobs is not None), default=0)
            result.top_logprobs, result.top_ids = raw.topk(max(1, count), dim=-1)
        if any(p.logit_bias for p in params):
            rows = [i for i, p in enumerate(params) if p.logit_bias]
            picked = slots[rows]
            biased = logits[rows].scatter_add_(1, self.bias_ids[picked], self.bias_values[picked])
            logits[rows] = biased
        if any(uses_penalties(p) for p in params):
            rows = [i for i, p in enumerate(params) if uses_penalties(p)]
            logits[rows] = self._penalised(logits[rows], slots[rows])
        for row, ids in forbidden:
            logits[row, list(ids)] = -torch.inf
        if masks is not None:
            self.mask(logits, masks)
        stuck = logits.amax(-1) == -torch.inf if masks is not None else None
        tokens = logits.argmax(dim=-1)
        rows = [i for i, p in enumerate(params) if p.temperature > 0]
        if rows:
            subset = [params[i] for i in rows]
            tokens[rows] = self._draw(logits[rows], slots[rows], positions[rows], subset)
        if any(uses_penalties(p) for p in params):  # what is stuck may only have to wait for its mask
            twice = torch.full_like(tokens, 2, dtype=torch.int32) if stuck is None else 2 * (~stuck).int()
            self.counts.index_put_((slots, tokens), twice, accumulate=True)
        if raw is not None:
            result.logprob = raw.gather(1, tokens[:, None]).squeeze(1)
        result.tokens = torch.where(finite, tokens, -1)
        if stuck is not None:
            result.tokens = torch.where(finite & stuck, -2, result.tokens)
        return result

    def mask(self, logits: torch.Tensor, masks: torch.Tensor) -> None:
        """Forbid, in place, what the masks do not allow."""
        if masks.is_cuda:
            forbidden = self._zeros[masks.view(torch.uint8).int()].flatten(1)
        else:  # ten times faster than an index there
            bits = np.unpackbits(~masks.numpy().view(np.uint8), axis=1, bitorder="little")
            forbidden = torch.from_numpy(bits).view(torch.bool)
        logits.masked_fill_(forbidden[:, : self.vocab_size], -torch.inf)

    def no_masks(self, rows: int) -> torch.Tensor:
        """Masks that allow every token."""
        return torch.full((rows, -(-self.vocab_size // 32)), -1, dtype=torch.int32, device=self.device)

    def _penalised(self, logits: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Repetition penalty (Keskar et al. 2019) over prompt and output; presence and frequency over output."""
        counts = self.counts[slots]
        output = (counts >> 1).to(torch.float32)
        repetition = torch.where(counts > 0, self.repetition[slots, None], 1.0)
        logits = torch.where(logits > 0, logits / repetition, logits * repetition)
        return logits - self.frequency[slots, None] * output - self.presence[slots, None] * (output > 0)

    def _draw(self, logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor,
              params: list[SamplingParams]) -> torch.Tensor:
        """Temperature, cuts, then the Gumbel-max trick: argmax(logits + Gumbel noise) samples the softmax."""
        logits = logits / self.temperature[slots, None]
        if any(0 < p.top_k < self.vocab_size for p in params):
            logits = self._cut_top_k(logits, slots, params)
        if any(p.top_p < 1 for p in params):
            logits = self._cut_top_p(logits, slots)
        if any(p.min_p > 0 for p in params):
            # softmax(x) < min_p * max softmax  <=>  x < max x + ln(min_p)
            floor = logits.amax(-1, keepdim=True) + self.min_p[slots, None].log()
            logits = logits.masked_fill(logits < floor, -torch.inf)
        noise = uniform(self.seed[slots], positions, self.vocab_size)
        return (logits - noise.log_().neg_().log_()).argmax(dim=-1)

    def _cut_top_k(self, logits: torch.Tensor, slots: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
        """Keep the k best of each row (and what ties with the last of them)."""
        k = self.top_k[slots, None]
        widest = max((p.top_k for p in params if 0 < p.top_k < self.vocab_size), default=1)
        if widest <= _SMALL_K:
            best = logits.topk(widest, dim=-1).values
            limit = best.gather(1, (k.clamp(max=widest) - 1))
            limit = torch.where(k < self.vocab_size, limit, -torch.inf)
        else:
            limit = logits.sort(dim=-1, descending=True).values.gather(1, k - 1)
        return logits.masked_fill(logits < limit, -torch.inf)

    def _cut_top_p(self, logits: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Nucleus sampling (Holtzman et al. 2019, arXiv 1904.09751): the fewest best tokens whose mass reaches p."""
        ordered = logits.sort(dim=-1, descending=True).values
        probabilities = torch.softmax(ordered, dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        top_p = self.top_p[slots, None]
        kept = ((before < top_p) | (top_p >= 1)).sum(dim=-1, keepdim=True).clamp(min=1)
        return logits.masked_fill(logits < ordered.gather(1, kept - 1), -torch.inf)


def count_tokens(tokens: list[int], num_prompt: int, vocab_size: int) -> np.ndarray:
    """int32 [vocab]: a slot's row of `counts`."""
    row = 2 * np.bincount(np.array(tokens[num_prompt:], dtype=np.int64), minlength=vocab_size).astype(np.int32)
    row[tokens[:num_prompt]] |= 1
    return row


def divisor(temperature: float) -> float:
    """What logits are divided by: 0 is greedy, and nothing else is colder than float32 can divide by."""
    return max(temperature, _COLDEST) if temperature else 0.0


def uses_penalties(params: SamplingParams) -> bool:
    """Whether a request needs the token counts of its slot."""
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
