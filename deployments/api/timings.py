"""Where the time of one answer went: the `timings` object that a request may ask for, and what the access log keeps.

Names are llama.cpp's where it has them (Open WebUI shows those). Durations of the engine are measured in its process,
all others in this one, so that no two machines' clocks are ever compared.
"""

from __future__ import annotations

from typing import Any

from deployments.api.choice import Choice
from deployments.api.job import Job


def timings(job: Job) -> dict[str, Any]:
    """Of an answer whose tokens have all come. Counts are sums over its choices, milliseconds those of the slowest one;
    null: it had none, or the engine did not tell.

    queue_ms       in the engine's queue, without a slot
    prompt_ms      from there to the first token
    predicted_ms   from the first token to the last, where the client is
    hops_us        microseconds elsewhere. receive: until the body was read and parsed; prepare: validation, template,
                   tokens, admission; transport: to the engine and back, with the wait for the step it was in
    """
    usage = job.usage()
    begun, received = job.record.begun, job.record.received_at
    queue = _longest(choice.waits[0] for choice in job.choices if choice.waits)
    prompt = _longest(choice.waits[1] for choice in job.choices if choice.waits)
    predicted = _longest(decode_seconds(choice) for choice in job.choices)
    further = usage.completion_tokens - sum(choice.tokens > 0 for choice in job.choices)
    sent = min((choice.sent_at for choice in job.choices if choice.sent_at is not None), default=None)
    hops = {
        "receive": None if received is None else received - begun,
        "prepare": None if received is None or sent is None else sent - received,
        "transport": _longest(_transport_seconds(choice) for choice in job.choices),
    }
    computed = usage.prompt_tokens - usage.cached_tokens
    return {
        "queue_ms": _ms(queue),
        "prompt_ms": _ms(prompt),
        "predicted_ms": _ms(predicted),
        "total_ms": _ms(job.record.seconds()),
        "cache_n": usage.cached_tokens,
        "prompt_n": computed,
        "predicted_n": usage.completion_tokens,
        "prompt_per_second": _rate(computed, prompt),
        "predicted_per_second": _rate(further, predicted),
        "hops_us": {name: None if seconds is None else round(seconds * 1e6) for name, seconds in hops.items()},
    }


def decode_seconds(choice: Choice) -> float | None:
    """From its first token to its last, as seen here; None for fewer than two."""
    if choice.tokens < 2 or choice.first_token_at is None or choice.last_token_at is None:
        return None
    return choice.last_token_at - choice.first_token_at


def _transport_seconds(choice: Choice) -> float | None:
    if choice.waits is None or choice.first_token_at is None or choice.sent_at is None:
        return None
    return max(choice.first_token_at - choice.sent_at - sum(choice.waits), 0.0)


def _longest(seconds: Any) -> float | None:
    return max((value for value in seconds if value is not None), default=None)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)


def _rate(count: int, seconds: float | None) -> float | None:
    return round(count / seconds, 2) if seconds else None
