"""/metrics, and what is counted there."""

import asyncio
import json
import logging
import pickle
import re
from dataclasses import replace

import pytest

from deployments.api.metrics import Metrics, render
from deployments.transport.base import NotReady, Overloaded
from model_core.errors import EngineDead, RequestError
from tests.api.conftest import endless
from tests.waiting import wait_until

MESSAGES = [{"role": "user", "content": "hi"}]


def samples(text):
    from prometheus_client.parser import text_string_to_metric_families

    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics(server):
    before = samples(server.raw("GET", "/metrics")[2].decode())
    server.fake.cached = 3
    server.chat(n=2)
    server.chat(temperature=5)
    status, headers, body = server.raw("GET", "/metrics")
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    after = samples(body.decode())
    model, engine = ("model_name", "acme/tiny"), ("engine", "0")

    def grown(name, *labels):
        key = (name, *sorted([*labels, ("api", "0")]))
        return after[key] - before.get(key, 0)

    assert after[("vllm:kv_cache_usage_perc", engine, model)] == pytest.approx(0.25)  # cached pages are not in use
    assert after[("vllm:prompt_tokens_total", engine, model)] == 11
    assert after[("vllm:generation_tokens_total", engine, model)] == 13
    assert after[("mini_llm:gpu_busy_seconds_total", engine, model)] == 90.0
    assert after[("mini_llm:gpu_idle_seconds_total", engine, model)] == 1.5
    assert after[("mini_llm:graphs_to_capture", engine, model)] == 3
    assert grown("vllm:time_to_first_token_seconds_count", model) == 2
    assert grown("vllm:inter_token_latency_seconds_count", model) == 6
    assert grown("vllm:request_success_total", model, ("finished_reason", "stop")) == 2
    assert grown("vllm:request_generation_tokens_sum", model) == 8
    assert grown("vllm:request_generation_tokens_bucket", model, ("le", "5.0")) == 2
    assert grown("vllm:prompt_tokens_cached_total", model) == 6  # of both choices, as prompt_tokens
    labels = [("handler", "/v1/chat/completions"), ("method", "POST")]
    assert grown("http_requests_total", *labels, ("status", "200")) == 1
    assert grown("http_requests_total", *labels, ("status", "400")) == 1
    assert grown("vllm:e2e_request_latency_seconds_count", model) == 1  # what was refused would look fast
    assert grown("vllm:request_queue_time_seconds_sum", model) == pytest.approx(0.004)
    assert grown("vllm:request_prefill_time_seconds_sum", model) == pytest.approx(0.008)
    assert grown("vllm:request_inference_time_seconds_sum", model) > 0.008
    assert grown("vllm:request_max_num_generation_tokens_sum", model) == 4
    assert after[("vllm:iteration_tokens_total_bucket", engine, ("le", "8.0"), model)] == 2
    assert after[("vllm:iteration_tokens_total_count", engine, model)] == 14
    assert after[("vllm:iteration_tokens_total_sum", engine, model)] == 77
    pool = [("block_size", "40"), engine, model, ("num_gpu_blocks", "100")]
    assert after[("vllm:cache_config_info", *pool)] == 1
    assert grown("http_request_duration_seconds_count", *labels) == 2
    for name in ("request_duration", "time_to_first_token", "time_per_output_token"):
        who = [("gen_ai_operation_name", "chat"), ("gen_ai_provider_name", "mini-llm-infra")]
        assert grown(f"gen_ai_server_{name}_seconds_count", *who, ("gen_ai_request_model", "acme/tiny")) == 1
    assert ("vllm:num_requests_running", engine, model) in after


# what vLLM's three Grafana dashboards ask for (api.md, 6.4)
DASHBOARDS = """num_requests_running num_requests_waiting kv_cache_usage_perc prompt_tokens_total generation_tokens_total
request_success_total num_preemptions_total prefix_cache_queries_total prefix_cache_hits_total
time_to_first_token_seconds_bucket inter_token_latency_seconds_bucket request_time_per_output_token_seconds_bucket
e2e_request_latency_seconds_bucket request_queue_time_seconds_bucket request_prefill_time_seconds_bucket
request_decode_time_seconds_bucket request_inference_time_seconds_bucket request_prompt_tokens_bucket
request_generation_tokens_bucket request_max_num_generation_tokens_bucket iteration_tokens_total_bucket
request_params_n_bucket request_params_max_tokens_bucket"""


def test_every_name_of_vllms_dashboards_is_there(server):
    assert server.chat()[0] == 200
    found = samples(server.raw("GET", "/metrics")[2].decode())
    for name in DASHBOARDS.split():
        series = [dict(key[1:]) for key in found if key[0] == f"vllm:{name}"]
        assert series and all(labels["model_name"] == "acme/tiny" for labels in series), name


def test_sequences_are_counted_by_how_they_ended(server):
    def ended():
        found = samples(server.raw("GET", "/metrics")[2].decode())
        return {dict(key[1:])["finished_reason"]: n for key, n in found.items() if key[0] == "vllm:request_success_total"}

    before = ended()
    server.chat(max_tokens=1)
    server.chat(n=2)
    server.fake.failure, server.fake.fail_after = EngineDead("gone"), 1
    server.chat()
    server.fake.failure = OSError("bug")
    server.chat()
    server.fake.failure, server.fake.script, server.fake.delay = None, endless, 0.01
    server.limits.request_timeout_s = 0.05
    server.chat(n=3)
    after = ended()
    grown = {reason: after[reason] - before.get(reason, 0) for reason in after}
    assert grown == {"length": 1, "stop": 2, "error": 2, "abort": 3}


@pytest.mark.parametrize("failure", [Overloaded("full"), NotReady(), RequestError("no", param="response_format")])
def test_what_a_model_replica_refuses_is_counted_like_what_is_not_let_in(server, caplog, failure):
    def counts():
        found = samples(server.raw("GET", "/metrics")[2].decode())
        return {key: value for key, value in found.items()
                if re.match(r"vllm:(request_success_total|e2e|request_\w+_(count|sum)|admission)", key[0])}  # fmt: skip

    server.chat()
    before, server.fake.failure = counts(), failure
    with caplog.at_level(logging.INFO, "mini_llm.access"):
        status = server.chat(n=2)[0]
        wait_until(lambda: caplog.records)
    grown = {key: value - before.get(key, 0) for key, value in counts().items() if value != before.get(key, 0)}
    assert [*grown.values()] == [1] * (status == 503) and all(key[0] == "vllm:admission_rejections_total" for key in grown)
    line = json.loads(caplog.records[-1].getMessage())
    assert line["status"] == status and not line.keys() & {"finish", "prompt_tokens", "completion_tokens"}
    server.fake.first_delay, server.limits.heartbeat_s = 0.1, 0.02
    assert "error" in server.stream()[-2]  # it has begun: no refusal any more
    aborted = ("vllm:request_success_total", ("api", "0"), ("finished_reason", "abort"), ("model_name", "acme/tiny"))
    assert counts()[aborted] == before.get(aborted, 0) + 1


def test_a_probe_that_is_told_to_wait_is_no_refused_request(fresh_server):
    server = fresh_server()
    server.gate.drain()

    def refused():
        found = samples(server.raw("GET", "/metrics")[2].decode())
        return [value for name, value in found.items() if name[0] == "vllm:admission_rejections_total"]

    assert server.raw("GET", "/ready")[0] == 503 and refused() == []
    assert server.chat()[0] == 503 and refused() == [1]


def test_the_load_is_that_of_all_http_replicas(fresh_server, monkeypatch):
    server, other = fresh_server(), Metrics()
    other.active = 2
    service = server.app.state.service

    async def everyone():
        return [other, service.own_metrics()]

    monkeypatch.setattr(service, "_everyone", everyone)
    with server.gate.hold(3):
        assert json.loads(server.raw("GET", "/load")[2]) == {"server_load": 5}


def test_an_engine_keeps_its_label_while_another_does_not_answer(server):
    """Else its counters would seem to jump."""

    def totals(*engines):
        stats = [replace(reading, engine=engine, steps=10 * engine) for engine in engines]
        found = samples(render("m", 0, stats, []).decode())
        return {labels[0][1]: value for (name, *labels), value in found.items() if name == "mini_llm:engine_steps_total"}

    [reading] = asyncio.run(server.fake.stats())
    assert totals(2, 0, 1) == {"0": 0, "1": 10, "2": 20} and totals(2) == {"2": 20} and totals(2, 2) == {"2": 20}


def test_an_http_replica_that_does_not_answer_leaves_the_others_their_counts():
    """A sum would fall, which Prometheus takes for a restart, and counts all of it again."""
    a, b = Metrics(), Metrics()
    for metrics, count in ((a, 1), (b, 2)):
        metrics.active, metrics.unknown_fields, metrics.cached_tokens, metrics.replica = count, 10 * count, count, count
        for _ in range(count):
            metrics.count_http("GET", "/ready", 200, 0.25)
            metrics.time_to_first_token.observe(0.5)
        metrics.finished["stop"] += count
    a.count_http("POST", "/v1/messages", 200, 1.0)
    b.count_gen_ai("chat", duration=1.0, first=None)

    def rendered(*seen):
        return samples(render("m", 0, [], [pickle.loads(pickle.dumps(one)) for one in seen]).decode())

    found = rendered(b, a)
    model, one, two = ("model_name", "m"), ("api", "1"), ("api", "2")
    for api, count in ((one, 1), (two, 2)):
        assert found[("vllm:time_to_first_token_seconds_count", api, model)] == count
        assert found[("vllm:time_to_first_token_seconds_sum", api, model)] == count / 2
        assert found[("vllm:request_success_total", api, ("finished_reason", "stop"), model)] == count
        assert found[("vllm:prompt_tokens_cached_total", api, model)] == count
        assert found[("mini_llm:api_active_sequences", api)] == count
        assert found[("mini_llm:unknown_request_fields_total", api)] == 10 * count
        assert found[("http_request_duration_seconds_count", api, ("handler", "/ready"), ("method", "GET"))] == count
    assert found[("http_request_duration_seconds_count", one, ("handler", "/v1/messages"), ("method", "POST"))] == 1
    assert found[("gen_ai_server_request_duration_seconds_count", two, ("gen_ai_operation_name", "chat"),
                  ("gen_ai_provider_name", "mini-llm-infra"), ("gen_ai_request_model", "m"))] == 1  # fmt: skip
    assert rendered(b) == {key: value for key, value in found.items() if one not in key}
