"""One JSON line per HTTP request on the logger `mini_llm.access`: ids, counts and milliseconds, never its text."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

import orjson

log = logging.getLogger("mini_llm.access")

PROBES = frozenset({"/health", "/ready", "/metrics"})  # asked every second or so by machines; logged at DEBUG

_UNTOLD = frozenset({"begun", "received_at", "min_priority"})


@dataclass
class Record:
    """Filled in while a request is served; None means "does not apply"."""

    id: str
    method: str
    route: str
    key: str | None = None  # name of the API key
    min_priority: int | None = None  # which this key may ask for
    status: int = 0  # 499: the client left (nginx's code)
    model: str | None = None
    stream: bool | None = None
    n: int | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    queue_ms: float | None = None  # in the engine's queue, slowest choice
    prefill_ms: float | None = None  # from there to its first token
    ttft_ms: float | None = None  # arrival to first token
    tpot_ms: float | None = None  # mean time per further token, slowest choice
    finish: str | None = None  # finish reasons of the choices, joined by commas
    error: str | None = None  # error code
    begun: float = field(default_factory=time.perf_counter)
    received_at: float | None = None  # when the body was there, time.perf_counter as `begun`

    def seconds(self) -> float:
        """Since the request's head arrived."""
        return time.perf_counter() - self.begun

    def write(self) -> None:
        level = logging.DEBUG if self.route in PROBES else logging.INFO
        if not log.isEnabledFor(level):
            return
        line = {"ts": round(time.time(), 3)}
        line.update({key: value for key, value in vars(self).items() if value is not None and key not in _UNTOLD})
        line["total_ms"] = round(self.seconds() * 1e3, 2)
        log.log(level, orjson.dumps(line).decode())
