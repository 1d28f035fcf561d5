"""POST /v1/messages: Anthropic's objects, events and errors, and the prompts they make."""

import json

import pytest

from deployments.transport.base import ReplicaLost
from tests.api.conftest import TEMPLATE, typed_events

TOOLS = [{"name": "f", "input_schema": {"type": "object"}}]
BASE = {"model": "acme/tiny", "max_tokens": 20, "messages": [{"role": "user", "content": "hi"}]}


def post(server, path="/v1/messages", **fields):
    status, headers, raw = server.raw("POST", path, {**BASE, **fields})
    return status, headers, json.loads(raw)


def events(server, **fields):
    status, _, raw = server.raw("POST", "/v1/messages", {**BASE, "stream": True, **fields})
    assert status == 200, raw
    return typed_events(raw)


def test_a_message(server):
    server.fake.cached = 3
    status, headers, answer = post(server, system="Be kind.", temperature=0.5, top_k=4)
    [request] = server.fake.requests
    assert status == 200 and answer.pop("id").startswith("msg_") and headers["x-request-id"]
    assert answer == {
        "type": "message", "role": "assistant", "model": "acme/tiny", "content": [{"type": "text", "text": "Hello world!"}],
        "stop_reason": "end_turn", "stop_sequence": None,
        "usage": {"input_tokens": len(request.prompt_ids) - 3, "cache_creation_input_tokens": 0,
                  "cache_read_input_tokens": 3, "output_tokens": 4},
    }  # fmt: skip
    assert (request.params.max_tokens, request.params.temperature, request.params.top_k) == (20, 0.5, 4)
    assert bytes(i for i in request.prompt_ids if i < 256).decode() == "system\nBe kind.\nuser\nhi\nassistant\n"


def test_blocks_are_text(server):
    blocks = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}]
    post(server, system=blocks, messages=[{"role": "user", "content": blocks}])
    server.chat(messages=[{"role": "system", "content": "a\nb"}, {"role": "user", "content": "a\nb"}])
    first, second = server.fake.requests
    assert first.prompt_ids == second.prompt_ids


def test_turns_of_one_role_are_combined(server):
    call = {"type": "tool_use", "id": "x", "name": "f", "input": {}}
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": "c"}]}
    for turns in ([["a", "b"], ["c", [call]]], [["a\nb"], [[{"type": "text", "text": "c"}, call]]]):
        users, assistants = ([{"role": role, "content": content} for content in contents]
                             for role, contents in zip(("user", "assistant"), turns, strict=True))  # fmt: skip
        assert post(server, messages=[*users, *assistants, result])[0] == 200
    first, second = server.fake.requests
    assert first.prompt_ids == second.prompt_ids


def test_system_messages_between_the_others(server):
    told = [{"role": "system", "content": [{"type": "text", "text": "b"}]}, {"role": "user", "content": "c"}]
    assert post(server, messages=[*BASE["messages"], *told])[0] == 200
    server.chat(messages=[*BASE["messages"], {"role": "system", "content": "b"}, told[1]])
    first, second = server.fake.requests
    assert first.prompt_ids == second.prompt_ids


def test_thinking_of_other_models_is_not_shown(server, fresh_server):
    thought = [{"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "redacted_thinking", "data": "y"}]
    for blocks in (thought, []):
        said = {"role": "assistant", "content": [*blocks, {"type": "text", "text": "b"}]}
        status, _, _ = post(server, thinking={"type": "adaptive"}, messages=[*BASE["messages"], said, *BASE["messages"]])
        assert status == 200
    first, second = server.fake.requests
    assert first.prompt_ids == second.prompt_ids
    other = fresh_server(template=TEMPLATE + "{{ reasoning_effort }}")
    post(other, output_config={"effort": "max"})
    assert bytes(i for i in other.fake.requests[0].prompt_ids if i < 256).decode().endswith("assistant\nmax")


def test_why_it_stopped(server):
    assert post(server, max_tokens=2)[2]["stop_reason"] == "max_tokens"
    stopped = post(server, stop_sequences=["wor", "zzz"])[2]
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "wor")
    assert stopped["content"][0]["text"] == "Hello "
    assert post(server, stop_token_ids=server.encode("!"))[2]["stop_reason"] == "end_turn"


def test_a_last_message_of_the_assistant_is_continued(server):
    messages = [*BASE["messages"], {"role": "assistant", "content": "Well, z"}]
    post(server, messages=messages)
    assert bytes(i for i in server.fake.requests[0].prompt_ids if i < 256).decode().endswith("assistant\nWell, z")


def test_the_events_of_a_stream(server):
    found = events(server)
    assert [one["type"] for one in found] == [
        "message_start", "content_block_start", *["content_block_delta"] * 3, "content_block_stop", "message_delta",
        "message_stop",
    ]  # fmt: skip
    begun = found[0]["message"]
    assert begun["content"] == [] and begun["stop_reason"] is None and begun["usage"]["output_tokens"] == 0
    assert begun["usage"]["input_tokens"] == len(server.fake.requests[0].prompt_ids)
    assert found[1]["content_block"] == {"type": "text", "text": ""}
    assert "".join(one["delta"]["text"] for one in found[2:5]) == "Hello world!"
    assert found[6]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None} and found[6]["usage"]["output_tokens"] == 4
    assert events(server, stop_sequences=["!"])[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "!"}


def test_a_streams_first_event_tells_the_cached_tokens_too(server):
    server.fake.cached = 3
    begun, *_, ended, _ = events(server)
    assert begun["message"]["usage"] == {**ended["usage"], "output_tokens": 0}
    assert begun["message"]["usage"]["cache_read_input_tokens"] == 3


def test_heartbeats_are_pings(server):
    """But for those before the message begins."""
    server.limits.heartbeat_s, server.fake.first_delay, server.fake.delay = 0.05, 0.13, 0.13
    raw = server.raw("POST", "/v1/messages", {**BASE, "stream": True, "max_tokens": 2})[2].decode()
    before, after = raw.split("event: message_start")
    assert set(before.split("\n\n")) == {": keep-alive", ""} and ": keep-alive" not in after
    assert after.count('event: ping\ndata: {"type":"ping"}\n\n') >= 2 and after.endswith('data: {"type":"message_stop"}\n\n')


def test_a_stream_that_fails(server):
    server.fake.failure, server.fake.fail_after = ReplicaLost("gone"), 1
    last = events(server)[-1]
    assert last["type"] == "error" and last["error"]["type"] == "overloaded_error" and "replica" in last["error"]["message"]


def test_a_made_up_max_tokens_is_all_the_room_there_is(server):
    post(server, max_tokens=128_000)
    [request] = server.fake.requests
    assert request.params.max_tokens == server.INFO.context_length - len(request.prompt_ids)


def test_tokens_are_counted_as_they_would_be_used(server):
    body = {"model": "acme/tiny", "messages": BASE["messages"], "system": "z"}
    status, _, raw = server.raw("POST", "/v1/messages/count_tokens", body)
    assert status == 200 and not server.fake.requests
    post(server, system="z")
    assert json.loads(raw) == {"input_tokens": len(server.fake.requests[0].prompt_ids)}


@pytest.mark.parametrize("chars", [300, 15_000])
def test_what_is_longer_than_the_context_is_counted_too(server, chars):
    body = {"model": "acme/tiny", "messages": [{"role": "user", "content": "y" * chars}]}
    status, _, raw = server.raw("POST", "/v1/messages/count_tokens", body)
    assert status == 200 and json.loads(raw)["input_tokens"] > server.INFO.context_length


@pytest.mark.parametrize(("fields", "words"), [
    ({"max_tokens": None}, "'max_tokens'"),
    ({"max_tokens": 0}, "'max_tokens'"),
    ({"model": None}, "'model'"),
    ({"messages": []}, "empty array"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role: "),
    ({"messages": [{"role": "system", "content": [{"type": "tool_addition"}]}]}, "messages[0].content[0]: Unsupp"),
    ({"messages": [{"role": "user", "content": 3}]}, "'messages[0].content'"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]: Unsupp"),
    ({"system": [{"type": "image", "source": {}}]}, "type text here"),
    ({"messages": [{"role": "user", "content": "y" * 300}]}, "maximum context length"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}, "cannot be continued"),
    ({"system": 3}, "'system'"),
    ({"temperature": 1.5}, "'temperature'"),
    ({"stop_sequences": ["a", "b", "c", "d", "e"]}, "'stop_sequences'"),
    ({"stop_sequences": [""]}, "'stop_sequences'"),
    ({"stop": ["a"]}, "Its name is stop_sequences here"),
    ({"response_format": {"type": "json_object"}}, "Its name is output_config.format here"),
    ({"tools": [{"name": "f"}]}, "'tools[0].input_schema'"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type: Invalid value: 'bash_20250124'"),
    ({"tool_choice": {"type": "any"}}, "only allowed when 'tools'"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "'tool_choice.name'"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "g"}}, "no function 'g'"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]}, "must follow the tool_use"),
    ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "f", "input": {}}]},
                   {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "x", "is_error": "true"}]}]}, "'messages[1].content[0].is_error'"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "'messages[0].content[0].tool_use_id'"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": [
        {"type": "tool_use", "id": "x", "name": "f", "input": {}}]}]}, "its result is missing"),
    ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "f", "input": "a"}]}]},
     "'messages[0].content[0].input'"),
    ({"thinking": {"type": "between_tools"}}, "'thinking'"),
    ({"output_config": {"effort": "most"}}, "output_config.effort: Invalid value"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "'thinking'"),
    ({"compaction": {"type": "summarize"}}, "'compaction'"),
])  # fmt: skip
def test_what_is_refused(server, fields, words):
    for stream in (False, True):
        status, headers, answer = post(server, stream=stream, **fields)
        assert status == 400 and answer["error"]["type"] == "invalid_request_error" and words in answer["error"]["message"]
        assert answer["type"] == "error" and answer["request_id"] == headers["x-request-id"] == headers["request-id"]
        assert answer.keys() == {"type", "error", "request_id"} and not server.fake.requests


def test_conversations_are_not_stored(server):
    """Anthropic's tool runner reads the details, and sends all messages from then on; else it would send the newest alone."""
    thread = {"type": "create"}
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        status, _, answer = post(server, path, thread=thread)
        assert status == 400 and "send the whole conversation" in answer["error"]["message"]
        assert answer["error"]["details"] == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}


def test_errors_of_every_layer_have_anthropics_envelope(server, fresh_server):
    from deployments.protocol.access import Access, ApiKey

    assert post(server, model="other")[2]["error"]["type"] == "not_found_error"
    status, _, raw = server.raw("GET", "/v1/messages")
    assert status == 405 and json.loads(raw)["type"] == "error"
    assert post(server, system="a" * 30_000)[2]["error"]["type"] == "request_too_large"
    server.limits.queue_timeout_s, server.fake.first_delay = 0.05, 5.0
    status, _, answer = post(server)
    assert status == 503 and answer["error"]["type"] == "overloaded_error"
    server.limits.request_timeout_s = 0.02
    status, _, answer = post(server)
    assert status == 408 and answer["error"]["type"] == "timeout_error"
    locked = fresh_server(access=Access(keys=[ApiKey(name="me", key="sesame")]))
    status, _, answer = post(locked)
    assert status == 401 and answer["error"]["type"] == "authentication_error"
    headers = {"content-type": "application/json", "x-api-key": "sesame"}
    assert locked.raw("POST", "/v1/messages", BASE, headers)[0] == 200
