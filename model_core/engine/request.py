"""What crosses the engine's border: requests in, token events out. Plain data, no torch, no text."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from model_core.grammar.spec import GrammarSpec

STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
UNANSWERABLE = "this request cannot be answered: "  # begins an event's error whose cause is the request
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens of one sequence are chosen and when it ends. Names and defaults follow vLLM; ids only, no text.

    temperature 0 is greedy. top_k <= 0, top_p 1, min_p 0, repetition_penalty 1 and the other penalties 0 are "off".
    Order: logit_bias, repetition / presence / frequency penalties, temperature, top_k, top_p, min_p, sample.
    seed: None draws one from the engine; the noise of a token depends on (seed, position) alone.
    logprobs: None for none, k >= 0 for the sampled token's and the k best tokens' log-probabilities (raw, before
    bias, penalties and temperature). prompt_logprobs: the same for every prompt token but the first; with it max_tokens may be
    0, for a sequence that ends when its prompt is computed.
    stop_ids end the sequence and are part of token events; eos of the model is added unless ignore_eos.
    grammar: what the output must look like; None for anything.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    grammar: GrammarSpec | None = None


@dataclass(frozen=True)
class Request:
    """One sequence to continue. `request_id` is unique among live requests of an engine; priority: lower goes first;
    cached prefixes are shared only between requests of the same cache_salt."""

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    cache_salt: str = ""

    @cached_property
    def ids(self) -> array[int]:
        """The prompt as 32-bit numbers. Raises OverflowError or TypeError if it is none."""
        return array("I", self.prompt_ids)


class TokenLogprobs(NamedTuple):
    """Log-probability of the sampled token, and the best tokens as (id, logprob), best first."""

    logprob: float
    top: list[tuple[int, float]]


class PromptLogprobs(NamedTuple):
    """Log-probabilities of prompt tokens, each given all that stand before it; packed, for a prompt has thousands.

    own: float32, of the tokens themselves; ranks: int32, 1 for a likeliest one; top_ids: int32 and top_logprobs: float32, the
    `count` best tokens of each, best first, one after another.
    """

    count: int  # type: ignore[assignment]  # hides tuple.count
    own: array[float]
    ranks: array[int]
    top_ids: array[int]
    top_logprobs: array[float]


class TokenEvent(NamedTuple):
    """New tokens of one request after a step. The event with `finish` set is the request's last.

    A stop or eos token is included in `token_ids` (count it in usage, do not print it). finish "error" carries `error`,
    which begins with UNANSWERABLE if the fault is the request's. On the event with the first token: cached_tokens (of the
    prompt, served from the prefix cache), and waits: seconds from the scheduler's queue to a slot, and from there to the
    token. prompt: of the prompt tokens that follow those of the event before; all come before the first token, in events
    without one.
    """

    request_id: str
    token_ids: list[int]
    finish: FinishReason | None = None
    logprobs: list[TokenLogprobs] | None = None
    error: str | None = None
    cached_tokens: int = 0
    waits: tuple[float, float] | None = None
    prompt: PromptLogprobs | None = None


@dataclass(frozen=True)
class EngineInfo:
    """What a front end must know to validate and describe a served model. JSON-serialisable."""

    model: str  # the name served, as clients send it
    source: str  # where the weights came from: "disk", "hub", "fallback"
    family: str
    parameters: int
    dtype: str
    device: str
    context_length: int  # prompt + output tokens of one sequence at most
    pool_tokens: int  # tokens the whole KV pool holds
    max_seqs: int
    vocab_size: int
    eos_ids: tuple[int, ...]
    numerics: str = ""  # a digest of the weights, kernels and settings that decide about the last bits of its numbers


@dataclass(frozen=True)
class EngineStats:
    """A reading of the live engine, cheap enough to take every second. JSON-serialisable."""

    running: int
    waiting: int
    pages_total: int
    pages_free: int  # never-used or freed pages
    pages_cached: int  # refcount 0, still indexed by the prefix cache: evictable
    steps: int
    prompt_tokens: int  # totals since start
    generation_tokens: int
    prefix_queries: int  # in tokens
    prefix_hits: int  # in tokens
    preemptions: int
    step_ms: float  # duration of the last step
    last_step_age_s: float  # seconds since the engine thread last made progress
    gpu_busy_s: float = 0.0  # totals since start; of steps on the device, and between steps while there was work; 0 on a CPU
    gpu_idle_s: float = 0.0
    step_tokens: tuple[int, ...] = ()  # steps by tokens computed, up to each of STEP_TOKENS (and beyond); totals since start
    computed_tokens: int = 0  # by all of them
    graphs_to_capture: int = 0  # when the engine is quiet, or when a step needs one: that step is then tens of ms late
    engine: int = 0  # its number among those that serve one model, set by the replica that it is in
