"""Spans of generation requests: names, times, parents, and that they carry no text."""

import sys
import types

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from deployments import exporter as exporter_module
from deployments.api.tracing import Tracer, open_tracer
from deployments.settings import AppArgs, parse_args
from model_core.errors import ConfigError
from model_core.errors import EngineDead as Dead

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "my secret"}], "temperature": 0.5, "max_tokens": 9, "stop": ["secret stop"]}
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def traced(fresh_server):
    """A server and a function that stops it and gives its spans."""
    spans = InMemorySpanExporter()
    server = fresh_server(tracer=Tracer(spans))

    def finished():
        server.stop()
        return spans.get_finished_spans()

    return server, finished


def test_a_span_of_a_request(traced):
    server, finished = traced
    server.fake.cached = 3
    headers = {"content-type": "application/json", "traceparent": PARENT, "x-request-id": "r1"}
    assert server.raw("POST", CHAT, {**BODY, "n": 2, "stream": True}, headers)[0] == 200
    (span,) = finished()
    assert span.name == "chat acme/tiny" and span.kind == SpanKind.SERVER and span.status.status_code == StatusCode.UNSET
    assert f"{span.context.trace_id:032x}" == PARENT[3:35] and f"{span.parent.span_id:016x}" == PARENT[36:52]
    assert 0 < span.end_time - span.start_time < 5e9
    found = dict(span.attributes)
    seconds = [found.pop("gen_ai.response.time_to_first_chunk"), found.pop("gen_ai.latency.time_in_queue"),
               found.pop("gen_ai.latency.time_in_model_prefill")]  # fmt: skip
    assert seconds[0] > 0 and seconds[1:] == [0.002, 0.004]
    assert found.pop("gen_ai.response.id").startswith("chatcmpl-")
    assert found.pop("gen_ai.openai.response.system_fingerprint").startswith("mini-llm-")
    assert found.pop("gen_ai.usage.input_tokens") > 20
    assert found == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "mini-llm-infra",
        "http.request.method": "POST",
        "http.route": CHAT,
        "http.response.status_code": 200,
        "mini_llm.request_id": "r1",
        "gen_ai.usage.output_tokens": 8,
        "gen_ai.usage.cache_read.input_tokens": 3,
        "gen_ai.response.finish_reasons": ("stop", "stop"),
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 0,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.stream": True,
        "gen_ai.request.model": "acme/tiny",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.model": "acme/tiny",
    }
    assert "secret" not in span.to_json() and span.resource.attributes["service.name"] == "mini-llm-infra"


def test_spans_of_failures_and_none_of_other_routes(traced):
    server, finished = traced
    server.raw("POST", CHAT, {**BODY, "n": 0}, None)
    server.raw("GET", CHAT)
    server.raw("GET", "/v1/models")
    server.fake.failure = Dead("x")
    server.raw("POST", "/v1/completions", {"prompt": "secret"}, {"content-type": "application/json", "traceparent": "junk"})
    server.fake.failure, server.fake.fail_after = Dead("x"), 1
    server.raw("POST", "/v1/completions", {"prompt": "secret", "stream": True})
    bad, dead, cut = finished()
    assert (bad.name, bad.status.status_code, bad.parent) == ("chat", StatusCode.UNSET, None)
    assert bad.attributes["error.type"] == "integer_below_min_value" and bad.attributes["http.response.status_code"] == 400
    assert (dead.name, dead.status.status_code) == ("text_completion acme/tiny", StatusCode.ERROR)
    assert dead.attributes["error.type"] == "replica_lost" and dead.attributes["gen_ai.response.finish_reasons"] == ("error",)
    assert (cut.status.status_code, cut.attributes["http.response.status_code"]) == (StatusCode.ERROR, 200)


def test_the_option_needs_the_exporter_and_says_so(monkeypatch):
    monkeypatch.setattr(exporter_module, "EXPORTER", "opentelemetry.exporter.nothing.here")
    with pytest.raises(ConfigError, match="tracing: spans cannot be sent.*pip install opentelemetry-exporter-otlp-proto-http"):
        parse_args({"tracing": "http://127.0.0.1:4318/v1/traces"}, AppArgs)
    monkeypatch.setattr(exporter_module, "EXPORTER", "opentelemetry.sdk.trace")
    assert parse_args({"tracing": "http://127.0.0.1:4318/v1/traces"}, AppArgs).tracing
    with pytest.raises(ConfigError, match="tracing"):
        parse_args({"tracing": "127.0.0.1:4318"}, AppArgs)


def test_the_exporter_gets_the_address(monkeypatch):
    made = []

    class Exporter(InMemorySpanExporter):
        def __init__(self, endpoint):
            super().__init__()
            made.append(endpoint)

    monkeypatch.setitem(sys.modules, exporter_module.EXPORTER, types.SimpleNamespace(OTLPSpanExporter=Exporter))
    open_tracer("http://127.0.0.1:4318/v1/traces").close()
    assert made == ["http://127.0.0.1:4318/v1/traces"]
