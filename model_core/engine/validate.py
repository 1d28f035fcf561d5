"""What a request must satisfy whoever sends it: the engine's own border, in numbers."""

from __future__ import annotations

import math

from model_core.engine.request import Request
from model_core.errors import RequestError

MAX_LOGPROBS = 100
MAX_LOGIT_BIAS = 512  # the sampler's table has this many entries per slot
MAX_STOP_IDS = 256
MAX_PROMPT_LOGPROBS = 1 << 18  # values of one prompt: 2 MiB, and some 20 MiB as JSON


def validate(request: Request, vocab_size: int) -> None:
    """Raises RequestError, naming the field and its limits, if a value is out of range."""
    p = request.params
    _between("temperature", p.temperature, 0, 100)
    _between("top_p", p.top_p, 0, 1)
    _between("min_p", p.min_p, 0, 1)
    _between("presence_penalty", p.presence_penalty, -2, 2)
    _between("frequency_penalty", p.frequency_penalty, -2, 2)
    _between("repetition_penalty", p.repetition_penalty, 0.01, 100)
    _between("min_tokens", p.min_tokens, 0, p.max_tokens)
    if p.logprobs is not None:
        _between("logprobs", p.logprobs, 0, min(MAX_LOGPROBS, vocab_size))
    if p.prompt_logprobs is not None:
        _between("prompt_logprobs", p.prompt_logprobs, 0, min(MAX_LOGPROBS, vocab_size))
        if (size := len(request.prompt_ids) * (p.prompt_logprobs + 1)) > MAX_PROMPT_LOGPROBS:
            raise RequestError(
                f"log-probabilities of {len(request.prompt_ids)} prompt tokens with {p.prompt_logprobs} alternatives each are "
                f"{size} values, at most {MAX_PROMPT_LOGPROBS} are possible: ask for fewer alternatives, or shorten the prompt",
                param="prompt_logprobs", code="invalid_value")  # fmt: skip
    if p.seed is not None:
        _between("seed", p.seed, -(1 << 63), (1 << 63) - 1)
    _size("logit_bias", len(p.logit_bias), MAX_LOGIT_BIAS)
    _size("stop_token_ids", len(p.stop_ids), MAX_STOP_IDS)
    if p.grammar is not None and p.ignore_eos and not p.stop_ids:
        raise RequestError(f"ignore_eos with {p.grammar.param} needs stop_token_ids: nothing could end the text otherwise",
                           param="ignore_eos", code="invalid_value")  # fmt: skip
    for value in p.logit_bias.values():
        _between("logit_bias", value, -100, 100)
    try:
        request.cache_salt.encode()
    except UnicodeEncodeError:
        raise RequestError("cache_salt holds half a surrogate pair", param="cache_salt", code="invalid_value") from None
    for field, ids in (("prompt", request.prompt_ids), ("logit_bias", p.logit_bias), ("stop_token_ids", p.stop_ids)):
        if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
            bad = next(i for i in ids if not 0 <= i < vocab_size)
            raise RequestError(f"{field} holds token id {bad}; ids of this model are 0 to {vocab_size - 1}",
                               param=field, code="invalid_value")


def _between(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise RequestError(f"{name} must be from {low} to {high}, got {value}", param=name, code="invalid_value")


def _size(name: str, size: int, limit: int) -> None:
    if size > limit:
        raise RequestError(f"{name} has {size} entries, at most {limit} are possible", param=name, code="invalid_value")
