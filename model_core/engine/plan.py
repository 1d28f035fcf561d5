"""What the scheduler hands to the runner: the work of one step, and the limits it was cut to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from model_core.cache.pages import PagePool
from model_core.engine.request import Request
from model_core.engine.sequence import Sequence
from model_core.errors import ConfigError, RequestError


@dataclass(frozen=True)
class Limits:
    """max_seqs: sequences that run at once (slots). max_batch_tokens: tokens a step computes at most.
    max_context: prompt + output tokens of one sequence."""

    max_seqs: int
    max_batch_tokens: int
    max_context: int

    def __post_init__(self) -> None:
        for name in ("max_seqs", "max_batch_tokens", "max_context"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_batch_tokens < self.max_seqs:
            raise ConfigError(
                f"max_batch_tokens is {self.max_batch_tokens} but max_seqs is {self.max_seqs}: a step must have room "
                f"for a token of every sequence; raise max_batch_tokens or lower max_seqs to {self.max_batch_tokens}")


class Scheduled(NamedTuple):
    """Compute tokens [start, start + count) of a sequence; `samples`: the last one's logits choose the next token.

    The host knows the input ids if start + count <= len(seq.tokens). Otherwise count is 1 and the input is the token
    that the step before samples, which is still on the device.
    """

    seq: Sequence
    start: int
    count: int  # type: ignore[assignment]  # hides tuple.count
    samples: bool

    @property
    def waits(self) -> bool:
        """Whether the mask of the token that it samples depends on one that the host does not know yet."""
        return self.seq.matcher is not None and self.start + self.count > len(self.seq.tokens)


class Scored(NamedTuple):
    """Positions [start, start + count) of a prompt, all in chunk number `chunk` of a plan: the logits there are the
    log-probabilities of the tokens that follow."""

    seq: Sequence
    chunk: int
    start: int
    count: int  # type: ignore[assignment]  # hides tuple.count

    @classmethod
    def of(cls, chunks: list[Scheduled]) -> list[Scored]:
        """What of these chunks is scored: each position once, also of a prompt that is computed again after a
        preemption. Counts it in `Sequence.scored`."""
        found = []
        for index, (seq, start, count, _) in enumerate(chunks):
            if seq.scored < seq.to_score:
                first, end = max(start, seq.scored), min(start + count, seq.to_score)
                assert start <= seq.scored, "a prefix hit has hidden logits"
                if first < end:
                    found.append(cls(seq, index, first, end - first))
                    seq.scored = end
        return found

    def rows(self, chunk_start: int, first: int) -> range:
        """Their rows in a batch, where the chunk begins with position `chunk_start` in row `first`."""
        return range(first + self.start - chunk_start, first + self.start - chunk_start + self.count)


@dataclass(slots=True)
class StepPlan:
    """One step: a token of each sequence of `decodes`, and chunks of prompts.

    decodes: each computes its token at starts[i] and samples. They are kept as two lists and not as `Scheduled`, of which a
        step of 256 decodes would make 256 (64 us).
    admitted: sequences that got a slot in this step, for the first time or again: the runner sets up slot state.
    grown: decodes that got a page in this step; all other block tables are as they were in the plan before, or admitted.
    preempted: ids of the sequences that lost their pages since the plan before.
    scored: what of the chunks is wanted for prompt log-probabilities.
    """

    step: int
    decodes: list[Sequence]
    starts: list[int]
    chunks: list[Scheduled]
    admitted: list[Sequence] = field(default_factory=list)
    grown: list[Sequence] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)

    @property
    def num_decodes(self) -> int:
        return len(self.decodes)

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(chunk.count for chunk in self.chunks)

    @property
    def entries(self) -> list[Scheduled]:
        """All work of the step alike, decodes first."""
        decodes = [Scheduled(seq, start, 1, True) for seq, start in zip(self.decodes, self.starts, strict=True)]
        return decodes + self.chunks

    @property
    def sampling(self) -> list[Sequence]:
        """The sequences that get a token, in the order in which the tokens are committed."""
        return self.decodes + [chunk.seq for chunk in self.chunks if chunk.samples] if self.chunks else self.decodes


def check_request(request: Request, limits: Limits, pool: PagePool) -> None:
    """Prove that a request can finish if it has the engine for itself. Raises RequestError with the numbers."""
    prompt, new, context = len(request.prompt_ids), request.params.max_tokens, limits.max_context
    if prompt == 0:
        raise RequestError("the prompt has no tokens: send at least one", param="prompt", code="empty_prompt")
    if new < (1 if request.params.prompt_logprobs is None else 0):
        raise RequestError(f"max_tokens is {new}, must be at least 1 (0 with prompt_logprobs)", param="max_tokens",
                           code="invalid_value")
    asked = f"prompt ({prompt} tokens) + max_tokens ({new})"
    if prompt + new > context:
        raise _too_long(f"{asked} is {prompt + new}, the context holds {context} tokens", prompt, context)
    # The token sampled last is never computed, so its keys and values need no room.
    needed, room = pool.pages_for(prompt + max(0, new - 1)), pool.capacity * pool.page_size
    if needed > pool.capacity:
        raise _too_long(f"{asked} needs {needed} KV pages of {pool.page_size} tokens, the pool has {pool.capacity} "
                        f"(kv_cache_bytes sets its size)", prompt, room + 1)
    try:
        len(request.ids)
    except (OverflowError, TypeError) as error:
        raise RequestError(f"the prompt must be token ids from 0 to 2**32 - 1: {error}", param="prompt",
                           code="invalid_value") from None


def _too_long(what: str, prompt: int, total: int) -> RequestError:
    """total: prompt and output tokens that would be possible."""
    if prompt < total:
        return RequestError(f"{what}: lower max_tokens to at most {total - prompt}", param="max_tokens",
                            code="context_length_exceeded")
    return RequestError(f"{what}: shorten the prompt to at most {total - 1} tokens", param="prompt",
                        code="context_length_exceeded")
