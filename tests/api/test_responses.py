"""POST /v1/responses: through the official client with its validation, event by event, and every way to be wrong."""

import json

import openai
import pytest

from deployments.transport.base import ReplicaLost
from tests.api.conftest import typed_events


def pairs(raw):
    """(type, data) of an SSE body with typed events, without comments."""
    return [(event["type"], event) for event in typed_events(raw) if isinstance(event, dict)]


def test_through_the_client(server):
    server.fake.cached = 3
    client = server.client(_strict_response_validation=True)
    answer = client.responses.create(model="acme/tiny", input="hi", instructions="Be kind.", max_output_tokens=40,
                                     temperature=0.5, metadata={"a": "b"}, store=True)  # fmt: skip
    assert answer.output_text == "Hello world!" and answer.status == "completed" and answer.error is None
    assert answer.id.startswith("resp_") and answer.output[0].id.startswith("msg_") and answer.store is False
    assert answer.metadata == {"a": "b"} and answer.instructions == "Be kind." and answer.max_output_tokens == 40
    assert answer.usage.output_tokens == 4 and answer.usage.input_tokens_details.cached_tokens == 3
    [request] = server.fake.requests
    assert answer.usage.input_tokens == len(request.prompt_ids)
    assert answer.usage.total_tokens == answer.usage.input_tokens + 4
    assert (request.params.max_tokens, request.params.temperature) == (40, 0.5)
    assert bytes(i for i in request.prompt_ids if i < 256).decode() == "system\nBe kind.\nuser\nhi\nassistant\n"


def test_conversations_make_the_prompt_of_a_chat(server):
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    said = {"type": "message", "role": "assistant", "status": "completed", "id": "msg_1",
            "content": [{"type": "output_text", "text": "c", "annotations": []}]}  # fmt: skip
    items = [{"role": "developer", "content": "be"}, {"role": "user", "content": parts}, said, {"role": "user", "content": "d"}]
    server.client().responses.create(model="acme/tiny", input=items)
    server.chat(messages=[{"role": "system", "content": "be"}, {"role": "user", "content": "a\nb"},
                          {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}])  # fmt: skip
    first, second = server.fake.requests
    assert first.prompt_ids == second.prompt_ids


def test_reasoning_of_other_models_is_not_shown(server):
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"}
    said = {"role": "assistant", "content": "c"}
    items = [{"role": "user", "content": "a"}, thought, said, {"role": "user", "content": "d"}]
    client = server.client(_strict_response_validation=True)
    answer = client.responses.create(model="acme/tiny", input=items, reasoning={"effort": "max", "summary": "auto"},
                                     include=["reasoning.encrypted_content"])  # fmt: skip
    assert answer.reasoning.effort == "max"
    client.responses.create(model="acme/tiny", input=[item for item in items if item != thought])
    first, second = server.fake.requests
    assert first.prompt_ids == second.prompt_ids


def test_an_answer_cut_by_its_limit_is_incomplete(server):
    answer = server.client().responses.create(model="acme/tiny", input="hi", max_output_tokens=2)
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output_text == "Hello world" and answer.output[0].status == "incomplete"
    stream = server.client().responses.create(model="acme/tiny", input="hi", max_output_tokens=2, stream=True)
    last = list(stream)[-1]
    assert last.type == "response.incomplete" and last.response.status == "incomplete"


def test_stop_strings(server):
    answer = server.client().responses.create(model="acme/tiny", input="hi", extra_body={"stop": ["wor", "z"]})
    assert (answer.status, answer.output_text, answer.output[0].status) == ("completed", "Hello ", "completed")
    stream = server.client().responses.create(model="acme/tiny", input="hi", extra_body={"stop": "wor"}, stream=True)
    last = list(stream)[-1]
    assert last.type == "response.completed" and last.response.output_text == "Hello "


def test_the_events_of_a_stream(server):
    status, headers, raw = server.raw("POST", "/v1/responses", {"input": "hi", "stream": True})
    assert status == 200 and headers["content-type"] == "text/event-stream; charset=utf-8"
    found = pairs(raw)
    assert [kind for kind, _ in found] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        *["response.output_text.delta"] * 3,
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert [content["sequence_number"] for _, content in found] == list(range(len(found)))
    assert "".join(content["delta"] for _, content in found[4:7]) == found[7][1]["text"] == "Hello world!"
    final = found[-1][1]["response"]
    assert final["output"] == [found[-2][1]["item"]] and final["usage"]["output_tokens"] == 4
    assert {content["item_id"] for _, content in found if "item_id" in content} == {final["output"][0]["id"]}
    whole = json.loads(server.raw("POST", "/v1/responses", {"input": "hi"})[2])
    assert final.keys() == whole.keys()


def test_the_clients_stream_helper(server):
    with server.client().responses.stream(model="acme/tiny", input="hi") as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == "Hello world!"
    assert kinds.count("response.output_text.delta") == 3 and kinds[-1] == "response.completed"


def test_a_stream_that_fails(server):
    server.fake.failure, server.fake.fail_after = ReplicaLost("gone"), 2
    found = pairs(server.raw("POST", "/v1/responses", {"input": "hi", "stream": True})[2])
    kind, content = found[-1]
    assert kind == "response.failed" and content["response"]["status"] == "failed"
    assert content["response"]["error"]["code"] == "server_error" and "replica" in content["response"]["error"]["message"]
    assert content["response"]["output"][0]["content"][0]["text"] == "Hello world"
    server.fake.fail_after = 0
    assert server.raw("POST", "/v1/responses", {"input": "hi", "stream": True})[0] == 503  # nothing was sent: a plain error


def test_extras_reach_the_engine(server):
    body = {"input": "hi", "top_k": 3, "min_p": 0.1, "seed": 7, "stop_token_ids": [5], "ignore_eos": True, "priority": 2,
            "max_output_tokens": 9, "min_tokens": 2, "presence_penalty": 1, "logit_bias": {"4": 2}}  # fmt: skip
    assert server.raw("POST", "/v1/responses", body)[0] == 200
    [request] = server.fake.requests
    p = request.params
    assert (p.top_k, p.min_p, p.seed, p.stop_ids, p.ignore_eos, p.min_tokens) == (3, 0.1, 7, (5,), True, 2)
    assert (request.priority, p.presence_penalty, p.logit_bias, p.max_tokens) == (2, 1.0, {4: 2.0}, 9)


@pytest.mark.parametrize(("fields", "code", "param"), [
    ({"input": None}, "missing_required_parameter", "input"),
    ({"input": []}, "empty_array", "input"),
    ({"input": 3}, "invalid_type", "input"),
    ({"input": [{"role": "tool", "content": "a"}]}, "invalid_value", "input[0].role"),
    ({"input": [{"role": "user"}]}, "missing_required_parameter", "input[0].content"),
    ({"input": [{"role": "user", "content": 3}]}, "invalid_type", "input[0].content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
     "unsupported_content_part", "input[0].content[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_text", "text": 3}]}]}, "invalid_type", "input[0].content[0].text"),
    ({"input": [{"role": "user", "content": [{"type": [], "text": "a"}]}]}, "unsupported_content_part", "input[0].content[0]"),
    ({"input": [{"type": "function_call", "name": "f"}]}, "missing_required_parameter", "input[0].call_id"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": "1"}]}, "invalid_value", "input[0].call_id"),
    ({"input": [{"role": "user", "content": "a"}, {"type": "web_search_call", "id": "x"}]}, "invalid_value", "input[1].type"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "invalid_value", "input[0].type"),
    ({"input": [{"type": "reasoning", "id": "x", "summary": []}]}, "invalid_value", "input"),
    ({"input": "y" * 300}, "context_length_exceeded", "input"),
    ({"max_output_tokens": 0}, "integer_below_min_value", "max_output_tokens"),
    ({"max_output_tokens": 10**6}, "integer_above_max_value", "max_output_tokens"),
    ({"temperature": 3}, "decimal_above_max_value", "temperature"),
    ({"metadata": {"a": 1}}, "invalid_type", "metadata.a"),
    ({"metadata": {str(i): "a" for i in range(17)}}, "object_above_max_properties", "metadata"),
    ({"reasoning": {"effort": "most"}}, "invalid_value", "reasoning.effort"),
    ({"previous_response_id": "resp_1"}, "unsupported_parameter", "previous_response_id"),
    ({"conversation": "conv_1"}, "unsupported_parameter", "conversation"),
    ({"background": True}, "unsupported_parameter", "background"),
    ({"tools": [{"type": "web_search"}]}, "unsupported_parameter", "tools[0]"),
    ({"tools": [{"name": "f"}]}, "missing_required_parameter", "tools[0].type"),
    ({"tools": [{"type": 3, "name": "f"}]}, "invalid_value", "tools[0].type"),
    ({"tools": [{"type": "function", "name": ""}]}, "invalid_value", "tools[0].name"),
    ({"tool_choice": {"type": "function", "name": "f"}}, "invalid_value", "tool_choice"),
    ({"max_tool_calls": 3}, "unsupported_parameter", "max_tool_calls"),
    ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "missing_required_parameter", "text.format.schema"),
    ({"text": {"format": {"type": "xml"}}}, "invalid_value", "text.format.type"),
    ({"stop": [""]}, "invalid_value", "stop"),
    ({"stop": list("abcde")}, "array_above_max_length", "stop"),
    ({"max_tokens": 5}, "unsupported_parameter", "max_tokens"),
    ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
    ({"n": 2}, "unsupported_parameter", "n"),
    ({"guided_json": {"type": "object"}}, "unsupported_parameter", "guided_json"),
    ({"truncation": "auto"}, "unsupported_parameter", "truncation"),
    ({"include": ["message.output_text.logprobs"]}, "unsupported_parameter", "include"),
])  # fmt: skip
def test_what_is_refused(server, fields, code, param):
    for stream in (False, True):
        status, _, raw = server.raw("POST", "/v1/responses", {"input": "hi", "stream": stream, **fields})
        error = json.loads(raw)["error"]
        assert (status, error["code"], error["param"]) == (400, code, param), error
        assert list(error) == ["message", "type", "param", "code"] and not server.fake.requests


def test_the_clients_exceptions(server):
    with pytest.raises(openai.NotFoundError):
        server.client().responses.create(model="other", input="hi")
    with pytest.raises(openai.BadRequestError, match="not stored"):
        server.client().responses.create(model="acme/tiny", input="hi", previous_response_id="resp_1")
    with pytest.raises(openai.NotFoundError):
        server.client().responses.retrieve("resp_1")


@pytest.mark.parametrize("kind", [[], {}, 1, True, "item_reference"], ids=str)
def test_items_of_no_type(server, kind):
    status, _, answer = server.raw("POST", "/v1/responses", {"input": [{"type": kind, "role": "user", "content": "a"}]})
    assert status == 400 and json.loads(answer)["error"]["param"].startswith("input")
