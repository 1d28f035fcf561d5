"""OpenTelemetry spans, by option: one per generation request, under gen_ai names, never with its text.

The span is made when the request is over, from its access record, so that serving costs nothing while tokens flow.
"""

from __future__ import annotations

import importlib
import time
from typing import TYPE_CHECKING, Any

from starlette.types import Scope

from deployments.api.job import Job
from deployments.api.record import Record
from deployments.exporter import EXPORTER

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion", "/chat/completions": "chat",
              "/v1/responses": "chat", "/responses": "chat", "/v1/messages": "chat",
              "/completions": "text_completion"}  # fmt: skip
_REQUEST = ("temperature", "top_p", "top_k", "seed", "frequency_penalty", "presence_penalty", "stream")


def open_tracer(endpoint: str) -> Tracer:
    """Spans go to this OTLP/HTTP address. OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES are honoured."""
    return Tracer(importlib.import_module(EXPORTER).OTLPSpanExporter(endpoint=endpoint))


class Tracer:
    """Spans are sent from a thread of its own, in batches; a collector that is away costs spans, never requests."""

    def __init__(self, exporter: SpanExporter) -> None:
        # here and not above: 0.2 s and 10 MB that nobody else needs
        from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource({SERVICE_NAME: "mini-llm-infra"}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("mini_llm")
        self._propagator = TraceContextTextMapPropagator()
        self._server, self._error = SpanKind.SERVER, StatusCode.ERROR

    def write(self, record: Record, scope: Scope) -> None:
        """The span of a request that is over; of others than OPERATIONS there is none. A child of the client's
        `traceparent`, if it sent one."""
        operation = OPERATIONS.get(record.route)
        if operation is None or record.method != "POST":
            return
        carrier = {
            name.decode(): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in (b"traceparent", b"tracestate")
        }
        end = time.time_ns()
        span = self._tracer.start_span(
            f"{operation} {record.model}" if record.model else operation,
            context=self._propagator.extract(carrier),
            kind=self._server,
            attributes=_attributes(record, operation, scope.get("mini_llm.job")),
            start_time=end - int(record.seconds() * 1e9),
        )
        if record.status >= 500 or (record.status == 200 and record.error is not None):  # a stream that ended with an error
            span.set_status(self._error)
        span.end(end)

    def close(self) -> None:
        """Sends what is left; blocks for that."""
        self._provider.shutdown()


def _attributes(record: Record, operation: str, job: Job | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "mini-llm-infra",
        "http.request.method": record.method,
        "http.route": record.route,
        "http.response.status_code": record.status,
        "error.type": record.error,
        "mini_llm.request_id": record.id,
        "mini_llm.key": record.key,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "gen_ai.response.finish_reasons": None if record.finish is None else record.finish.split(","),
        "gen_ai.response.time_to_first_chunk": _seconds(record.ttft_ms),
        "gen_ai.latency.time_in_queue": _seconds(record.queue_ms),  # vLLM's names, which no convention has yet
        "gen_ai.latency.time_in_model_prefill": _seconds(record.prefill_ms),
    }
    if job is not None:
        found.update({f"gen_ai.request.{name}": getattr(job.request, name) for name in _REQUEST})
        found.update(
            {
                "gen_ai.request.model": job.head.model,
                "gen_ai.request.max_tokens": job.choices[0].request.params.max_tokens,
                "gen_ai.request.choice.count": job.request.n,
                "gen_ai.response.model": job.head.model,
                "gen_ai.response.id": job.head.id,
                "gen_ai.openai.response.system_fingerprint": job.head.system_fingerprint,
            }
        )
    return {name: value for name, value in found.items() if value is not None}


def _seconds(ms: float | None) -> float | None:
    return None if ms is None else ms / 1e3
