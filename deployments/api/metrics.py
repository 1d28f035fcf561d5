"""/metrics: Prometheus text under vLLM's names, so that its dashboards work unchanged.

Latencies and request counts are measured where the client sees them, in each Api replica, and labelled `api`; engine gauges
and token counters are read from every model replica at scrape time and labelled `engine`. The one that is asked tells those of
all. Sums would fall whenever one does not answer in time, or is replaced: to Prometheus a restart of all.
Histograms are plain integers, not prometheus_client's: one observation per token must not take a lock (0.2 us against 1.1 us,
EPYC).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, chain

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from model_core.engine.request import STEP_TOKENS, EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# fmt: off
_TTFT = (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
_ITL = (.001, .0025, .005, .0075, .01, .015, .02, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 10,
        20, 40, 80)
_E2E = (.01, .02, .05, .1, .2, .3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480,
        960, 1920, 7680)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_SMALL = (1, 2, 5, 10, 20)
_GEN_AI = {  # OpenTelemetry's server metrics, with the buckets that its conventions advise
    "duration": ("gen_ai_server_request_duration_seconds", "Requests that were let in, whole.",
                 (.01, .02, .04, .08, .16, .32, .64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)),
    "first": ("gen_ai_server_time_to_first_token_seconds", "From a request's arrival to its first token.",
              (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10)),
    "further": ("gen_ai_server_time_per_output_token_seconds", "Mean time per token after the first.",
                (.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5)),
}
# fmt: on


class Histogram:
    """Cumulative counts per bucket, Prometheus' `le` semantics. Not thread-safe: the event loop is its only user."""

    __slots__ = ("_bounds", "_counts", "_sum", "help", "name")

    def __init__(self, name: str, help: str, bounds: Sequence[float]) -> None:
        self.name = name
        self.help = help
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, *labels: str) -> None:
        """These counts as one more series of `family`."""
        family.add_metric(labels, _buckets(self._bounds, self._counts), self._sum)


def _buckets(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """Cumulative, as the exposition wants them. counts: one more than bounds, of what is beyond the last."""
    names = [*(repr(float(bound)) for bound in bounds), "+Inf"]
    return [(name, float(total)) for name, total in zip(names, accumulate(counts), strict=True)]


class Metrics:
    """What one Api replica has seen since it started.

    active: sequences that it holds, set when somebody asks. replica: its number, which the one that replaces it gets, too.
    """

    def __init__(self) -> None:
        self.active = 0
        self.replica = 0
        self.time_to_first_token = Histogram(
            "vllm:time_to_first_token_seconds", "From the request's arrival at the API to its first token.", _TTFT
        )
        self.inter_token_latency = Histogram(
            "vllm:inter_token_latency_seconds", "Between two token events of a sequence, at the API.", _ITL
        )
        self.request_latency = Histogram("vllm:e2e_request_latency_seconds", "Requests that were let in, whole.", _E2E)
        self.time_per_output_token = Histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time between tokens of a finished sequence.", _ITL
        )
        self.queue_time = Histogram(
            "vllm:request_queue_time_seconds", "In the engine's queue, before the first slot.", _E2E
        )
        self.prefill_time = Histogram(
            "vllm:request_prefill_time_seconds", "From the slot to the first token, in the engine.", _E2E
        )
        self.inference_time = Histogram(
            "vllm:request_inference_time_seconds", "From the slot to the last token: prefill and decode.", _E2E
        )
        self.decode_time = Histogram(
            "vllm:request_decode_time_seconds", "From the first to the last token of a sequence, at the API.", _E2E
        )
        self.prompt_tokens = Histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self.generation_tokens = Histogram("vllm:request_generation_tokens", "Tokens generated for it.", _TOKENS)
        self.max_generation = Histogram(
            "vllm:request_max_num_generation_tokens", "Tokens of the longest choice of a request.", _TOKENS
        )
        self.max_tokens = Histogram("vllm:request_params_max_tokens", "max_tokens after clamping.", _TOKENS)
        self.n = Histogram("vllm:request_params_n", "n of a request.", _SMALL)
        self.finished: Counter[str] = Counter()  # by finish reason, per sequence
        self.rejected: Counter[str] = Counter()  # by error code
        self.http: Counter[tuple[str, str, str]] = Counter()  # method, route, status
        self.http_time: dict[tuple[str, str], Histogram] = {}  # method, route
        self.gen_ai: dict[tuple[str, str], Histogram] = {}  # key of _GEN_AI, operation
        self.tool_calls: Counter[str] = Counter()
        self.unknown_fields = 0
        self.cached_tokens = 0

    def count_http(self, method: str, route: str, status: int, seconds: float) -> None:
        """One answered request. method and route must be of small sets."""
        self.http[method, route, str(status)] += 1
        histogram = self.http_time.get((method, route))
        if histogram is None:
            histogram = self.http_time[method, route] = Histogram("http_request_duration_seconds", "", _E2E)
        histogram.observe(seconds)

    def count_gen_ai(self, operation: str, **seconds: float | None) -> None:
        """One request under OpenTelemetry's names: seconds by key of _GEN_AI. operation: "chat" or "text_completion"."""
        for key, value in seconds.items():
            if value is None:
                continue
            histogram = self.gen_ai.get((key, operation))
            if histogram is None:
                histogram = self.gen_ai[key, operation] = Histogram(*_GEN_AI[key])
            histogram.observe(value)

    def histograms(self) -> Iterator[Histogram]:
        return (value for value in vars(self).values() if isinstance(value, Histogram))


def render(model: str, pool_tokens: int, stats: Sequence[EngineStats], seen: Sequence[Metrics]) -> bytes:
    """The exposition text. pool_tokens: of each replica's KV pool; stats: one reading per model replica; seen: of each Api
    replica."""
    families = chain(_engine_families(model, pool_tokens, stats), _api_families(model, seen))
    return generate_latest(_Snapshot(families))  # type: ignore[arg-type]


def _api_families(model: str, seen: Sequence[Metrics]) -> Iterator[Metric]:
    """What the Api replicas count, a series of each, whichever of them answer."""
    replicas = [(str(number), metrics) for number, metrics in sorted({one.replica: one for one in seen}.items())]
    labels = ["model_name", "api"]
    for histograms in zip(*(metrics.histograms() for _, metrics in replicas), strict=True):
        family = HistogramMetricFamily(histograms[0].name, histograms[0].help, labels=labels)
        for (api, _), histogram in zip(replicas, histograms, strict=True):
            histogram.add_to(family, model, api)
        yield family
    for name, help, key, counts in _COUNTED:
        counter = CounterMetricFamily(name, help, labels=[*labels, key])
        for api, metrics in replicas:
            for value, count in counts(metrics).items():
                counter.add_metric([model, api, value], count)
        yield counter
    cached = CounterMetricFamily("vllm:prompt_tokens_cached", "Prompt tokens from the cache.", labels=labels)
    unknown = CounterMetricFamily("mini_llm:unknown_request_fields", "Fields of requests, ignored as unknown.", labels=["api"])
    held = GaugeMetricFamily("mini_llm:api_active_sequences", "Sequences that the Api replicas are answering.", labels=["api"])
    http = CounterMetricFamily("http_requests", "HTTP requests.", labels=["method", "handler", "status", "api"])
    times = HistogramMetricFamily("http_request_duration_seconds", "HTTP requests.", labels=["method", "handler", "api"])
    labels_of = ["gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model", "api"]
    gen_ai = {key: HistogramMetricFamily(name, help, labels=labels_of) for key, (name, help, _) in _GEN_AI.items()}
    for api, metrics in replicas:
        cached.add_metric([model, api], metrics.cached_tokens)
        unknown.add_metric([api], metrics.unknown_fields)
        held.add_metric([api], metrics.active)
        for names, count in metrics.http.items():
            http.add_metric([*names, api], count)
        for route, histogram in metrics.http_time.items():
            histogram.add_to(times, *route, api)
        for (key, operation), histogram in metrics.gen_ai.items():
            histogram.add_to(gen_ai[key], operation, "mini-llm-infra", model, api)
    yield from (cached, unknown, held, http, times, *gen_ai.values())


def _engine_families(model: str, pool_tokens: int, stats: Sequence[EngineStats]) -> Iterator[Metric]:
    """What the engines keep, one series each, whichever of them answer."""
    labels = ["model_name", "engine"]
    engines = sorted({reading.engine: reading for reading in stats}.items())
    for name, help, read in _GAUGES:
        gauge = GaugeMetricFamily(name, help, labels=labels)
        for i, reading in engines:
            gauge.add_metric([model, str(i)], read(reading))
        yield gauge
    for name, help, read in _COUNTERS:
        counter = CounterMetricFamily(name, help, labels=labels)
        for i, reading in engines:
            counter.add_metric([model, str(i)], read(reading))
        yield counter
    steps = HistogramMetricFamily("vllm:iteration_tokens_total", "Tokens computed in an engine step.", labels=labels)
    config = GaugeMetricFamily("vllm:cache_config_info", "The KV pool.", labels=[*labels, "block_size", "num_gpu_blocks"])
    for i, reading in engines:
        if reading.step_tokens:
            steps.add_metric([model, str(i)], _buckets(STEP_TOKENS, reading.step_tokens), reading.computed_tokens)
        pages = reading.pages_total
        config.add_metric([model, str(i), str(pool_tokens // pages if pages else 0), str(pages)], 1)
    yield steps
    yield config


_GAUGES = (
    ("vllm:num_requests_running", "Sequences in the batch.", lambda s: s.running),
    ("vllm:num_requests_waiting", "Sequences waiting for pages or slots.", lambda s: s.waiting),
    (
        "vllm:kv_cache_usage_perc",
        "Share of KV pages in use, 0 to 1.",
        lambda s: 1 - (s.pages_free + s.pages_cached) / s.pages_total if s.pages_total else 0.0,
    ),
    ("mini_llm:step_seconds", "Duration of the last engine step.", lambda s: s.step_ms / 1e3),
    ("mini_llm:last_step_age_seconds", "Since the engine last made progress.", lambda s: s.last_step_age_s),
    ("mini_llm:graphs_to_capture", "CUDA graphs that the engine captures when it is quiet, or needs them.",
     lambda s: s.graphs_to_capture),
)
_COUNTERS = (
    ("vllm:prompt_tokens", "Prompt tokens computed or taken from the cache.", lambda s: s.prompt_tokens),
    ("vllm:generation_tokens", "Tokens generated.", lambda s: s.generation_tokens),
    ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", lambda s: s.prefix_queries),
    ("vllm:prefix_cache_hits", "Prompt tokens found there.", lambda s: s.prefix_hits),
    ("vllm:num_preemptions", "Sequences put back to waiting for lack of pages.", lambda s: s.preemptions),
    ("mini_llm:engine_steps", "Engine steps.", lambda s: s.steps),
    ("mini_llm:gpu_busy_seconds", "Time that steps took on the GPU.", lambda s: s.gpu_busy_s),
    ("mini_llm:gpu_idle_seconds", "Time between steps in which the GPU waited for the host.", lambda s: s.gpu_idle_s),
)


_COUNTED: tuple[tuple[str, str, str, Callable[[Metrics], Counter[str]]], ...] = (
    ("vllm:request_success", "Sequences that ended.", "finished_reason", lambda seen: seen.finished),
    ("vllm:admission_rejections", "Requests refused, by reason.", "reason", lambda seen: seen.rejected),
    ("mini_llm:tool_calls", "Calls of tools; broken: never closed, or arguments that are no JSON.", "state",
     lambda seen: seen.tool_calls),
)


class _Snapshot:
    """What generate_latest wants of a registry."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
