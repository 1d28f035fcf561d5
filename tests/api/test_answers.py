"""Real answers of every endpoint against /openapi.json, without a field that it does not name."""

import json

import pytest
from jsonschema import Draft202012Validator

from deployments.api.contract import openapi
from deployments.transport.base import ReplicaLost
from tests.api.conftest import events, typed_events

CHAT, TEXT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
HELLO = [{"role": "user", "content": "hi"}]
BASE = {
    CHAT: {"messages": HELLO},
    TEXT: {"prompt": "ab"},
    RESPONSES: {"input": "hi"},
    MESSAGES: {"model": "acme/tiny", "max_tokens": 9, "messages": HELLO},
}
EXTRAS = {"return_token_ids": True, "timings": True, "prompt_logprobs": 2, "n": 2}
USAGE = {"include_usage": True, "continuous_usage_stats": True}
ASKED = [
    (CHAT, {}), (CHAT, {"logprobs": True, "top_logprobs": 2, **EXTRAS}), (CHAT, {"max_tokens": 1}),
    (CHAT, {"stop": "wor", "logprobs": True}), (CHAT, {"stop_token_ids": [256]}), (CHAT, {"stream_options": USAGE, **EXTRAS}),
    (TEXT, {}), (TEXT, {"logprobs": 1, "echo": True, "prompt": ["ab", "c"], **EXTRAS}), (TEXT, {"logprobs": 0}),
    (TEXT, {"echo": True, "max_tokens": 0, "logprobs": 1}), (TEXT, {"stream_options": USAGE, "stop": "wor", **EXTRAS}),
    (RESPONSES, {}), (RESPONSES, {"instructions": "be", "max_output_tokens": 1, "metadata": {"a": "b"}}),
    (RESPONSES, {"reasoning": {"effort": "low"}, "temperature": 0.5}),
    (MESSAGES, {}), (MESSAGES, {"max_tokens": 1, "system": "be"}), (MESSAGES, {"stop_sequences": ["wor"]}),
]  # fmt: skip
F = {"name": "f", "parameters": {"type": "object"}}
CALLING = [
    (CHAT, {"tools": [{"type": "function", "function": F}], "logprobs": True, "stream_options": USAGE, **EXTRAS}),
    (RESPONSES, {"tools": [{"type": "function", **F}], "tool_choice": "auto"}),
    (RESPONSES, {"tools": [{"type": "function", **F}], "parallel_tool_calls": False, "tool_choice": {
        "type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]}}),
    (MESSAGES, {"tools": [{"name": "f", "input_schema": {"type": "object"}}], "max_tokens": 200}),
]  # fmt: skip
POSTS = [
    ("/tokenize", {"prompt": "ab"}), ("/tokenize", {"messages": HELLO, "return_token_strs": True}),
    ("/detokenize", {"tokens": [97]}), ("/v1/messages/count_tokens", {"model": "acme/tiny", "messages": HELLO}),
]  # fmt: skip
GETS = {"/": "/", "/v1/models": "/v1/models", "/v1/models/{id}": "/v1/models/acme/tiny", "/v1/capabilities": "/v1/capabilities",
        "/tokenizer_info": "/tokenizer_info", "/health": "/health", "/ready": "/ready", "/metrics": "/metrics",
        "/version": "/version", "/openapi.json": "/openapi.json", "/load": "/load", "/docs": "/docs",
        "/debug/dispatch": "/debug/dispatch"}  # fmt: skip


def closed(schema):
    """The same, but objects may only have the properties that are named."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    if isinstance(found.get("properties"), dict) and found.get("type") == "object":
        found.setdefault("additionalProperties", False)
    return found


DOCUMENT = closed(openapi("1"))


def check(schema, instance):
    Draft202012Validator({**schema, "components": DOCUMENT["components"]}).validate(instance)


def schema_of(method, path, status=200, kind="application/json"):
    answers = DOCUMENT["paths"][path][method]["responses"]
    return answers.get(str(status), answers["default"])["content"][kind]["schema"]


def events_of(path, raw):
    return (typed_events if path in (RESPONSES, MESSAGES) else events)(raw)


def test_every_route_is_described_and_checked_here(server):
    assert DOCUMENT["paths"].keys() == {path for path, _ in ASKED + POSTS} | GETS.keys()
    aliases = {"/chat/completions", "/completions", "/responses", "/models", "/models/{id:path}"}
    routes = {route.path.replace(":path", "") for route in server.app.routes if route.path not in aliases}
    assert routes == DOCUMENT["paths"].keys()
    Draft202012Validator.check_schema(DOCUMENT["components"])


@pytest.mark.parametrize(("path", "fields"), ASKED, ids=[f"{path}-{'-'.join(fields)}" for path, fields in ASKED])
def test_whole_answers_and_streams(server, path, fields):
    body = {**BASE[path], **fields}
    server.fake.script = lambda request: [*server.encode("Hello é world!"), server.IM_END]
    if "stream_options" not in fields:
        status, _, raw = server.raw("POST", path, body)
        assert status == 200
        check(schema_of("post", path), json.loads(raw))
    status, headers, raw = server.raw("POST", path, {**body, "stream": True})
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    check(schema_of("post", path, kind="text/event-stream")["contentSchema"], events_of(path, raw))


@pytest.mark.parametrize(("path", "fields"), CALLING, ids=[path for path, _ in CALLING])
def test_answers_with_calls(roomy, path, fields):
    says = 'So: <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>\n<tool_call>{"name": "f", "arguments": {]'
    roomy.fake.script = lambda request: [*roomy.encode(says), roomy.IM_END]
    for stream in (False, True):
        body = {**BASE[path], **fields, "stream": stream}
        if not stream:
            body.pop("stream_options", None)
        status, _, raw = roomy.raw("POST", path, body)
        assert status == 200 and (b"tool_use" in raw or b"function" in raw)
        kind = "text/event-stream" if stream else "application/json"
        schema = schema_of("post", path, kind=kind)
        check(schema["contentSchema"] if stream else schema, events_of(path, raw) if stream else json.loads(raw))


@pytest.mark.parametrize("path", BASE)
def test_errors_before_and_after_a_stream_began(server, path):
    status, _, raw = server.raw("POST", path, {**BASE[path], "temperature": 9})
    assert status == 400
    check(schema_of("post", path, 400), json.loads(raw))
    server.fake.failure, server.fake.fail_after, server.fake.delay = ReplicaLost("gone"), 1, 0.01
    status, _, raw = server.raw("POST", path, {**BASE[path], "stream": True})
    found = events_of(path, raw)
    assert status == 200 and any("error" in str(event.get("type", event)) or "failed" in str(event.get("type", ""))
                                 for event in found if isinstance(event, dict))  # fmt: skip
    check(schema_of("post", path, kind="text/event-stream")["contentSchema"], found)


@pytest.mark.parametrize(("path", "body"), POSTS)
def test_tokens(server, path, body):
    status, _, raw = server.raw("POST", path, body)
    assert status == 200
    check(schema_of("post", path), json.loads(raw))
    status, _, raw = server.raw("POST", path, {**body, "model": 3})
    assert status == 400
    check(schema_of("post", path, 400), json.loads(raw))


@pytest.mark.parametrize("path", GETS)
def test_what_the_server_tells(server, path):
    status, headers, raw = server.raw("GET", GETS[path])
    kind = headers["content-type"].split(";")[0]
    assert status == 200
    check(schema_of("get", path, kind=kind), json.loads(raw) if kind == "application/json" else raw.decode())


def test_a_server_that_is_not_ready(server):
    server.fake.ready = False
    status, _, raw = server.raw("GET", "/ready")
    assert status == 503
    check(schema_of("get", "/ready", 503), json.loads(raw))


def test_the_check_sees_a_field_that_is_not_named(server):
    answer = server.chat()[2]
    check(schema_of("post", CHAT), answer)
    for path in ([], ["choices", 0], ["choices", 0, "message"], ["usage", "prompt_tokens_details"]):
        changed = json.loads(json.dumps(answer))
        inner = changed
        for key in path:
            inner = inner[key]
        inner["surprise"] = 1
        assert not Draft202012Validator(
            {**schema_of("post", CHAT), "components": DOCUMENT["components"]}).is_valid(changed), path  # fmt: skip
