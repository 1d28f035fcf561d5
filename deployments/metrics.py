"""Engine readings in Ray's own metrics, so that they sit beside Serve's in Prometheus and the dashboard.

Exported by each node's Ray agent as ray_mini_llm_*. Written once a second from totals that the engine keeps anyway: a
counter's inc() costs 8 us, once per token it would be a tenth of the engine's budget.
"""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

from model_core.engine.request import EngineStats

_GAUGES = {
    "running": "Sequences in the batch.",
    "waiting": "Sequences waiting for pages, slots or tokens of the step's budget.",
    "pages_total": "Pages of the KV pool.",
    "pages_free": "Pages that hold nothing.",
    "pages_cached": "Pages kept by the prefix cache alone, evictable.",
    "step_ms": "Milliseconds of the last engine step.",
    "last_step_age_s": "Seconds since the engine made progress, 0 when it has nothing to do.",
    "graphs_to_capture": "Steps that are not captured as CUDA graphs yet: each is when the engine is quiet, or needs it.",
}
_COUNTERS = {
    "steps": "Engine steps.",
    "prompt_tokens": "Prompt tokens computed or taken from the prefix cache.",
    "generation_tokens": "Tokens generated.",
    "prefix_queries": "Prompt tokens looked up in the prefix cache.",
    "prefix_hits": "Prompt tokens found in it.",
    "preemptions": "Sequences put back to waiting for lack of pages.",
    "gpu_busy_s": "Seconds that steps took on the GPU.",
    "gpu_idle_s": "Seconds between steps in which the GPU waited for the host.",
}


class EngineMetrics:
    """Of one model replica. Serve's replica context adds no tags here; `model` and Ray's worker id tell them apart."""

    def __init__(self, model: str) -> None:
        tags = {"model": model}
        self._gauges = {name: Gauge(f"mini_llm_{name}", text, ("model",)) for name, text in _GAUGES.items()}
        self._counters = {name: Counter(f"mini_llm_{name}", text, ("model",)) for name, text in _COUNTERS.items()}
        for metric in [*self._gauges.values(), *self._counters.values()]:
            metric.set_default_tags(tags)
        self._seen: dict[str, float] = dict.fromkeys(_COUNTERS, 0)

    def report(self, stats: EngineStats) -> None:
        for name, gauge in self._gauges.items():
            gauge.set(getattr(stats, name))
        for name, counter in self._counters.items():
            total = getattr(stats, name)
            if total > self._seen[name]:
                counter.inc(total - self._seen[name])
                self._seen[name] = total
