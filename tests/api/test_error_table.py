"""The error table of the API's contract, row by row, at every endpoint it can happen at: status, envelope and headers.

What is in it and cannot happen here:
- 403, a key that may not use a model or an admin route: one model is served, keys have no list of models, and there are no
  admin routes.
- 422: bodies that are not valid are a 400, see `test_no_answer_is_a_422`.
- 499: nobody is left to get it; it is the code in the access log (test_edge.py).
What answers before this application does is checked where it runs: tests/deployments/test_app.py.
"""

import json
import re

import pytest

from deployments.protocol.access import Access, ApiKey
from deployments.transport.base import NotReady, Overloaded, ReplicaLost
from model_core.errors import EngineDead

JSON = {"content-type": "application/json"}
HELLO = [{"role": "user", "content": "hi"}]
GENERATING = {
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/completions": {"prompt": "ab"},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"model": "acme/tiny", "max_tokens": 99, "messages": HELLO},
}
POSTS = {
    **GENERATING,
    "/v1/messages/count_tokens": {"model": "acme/tiny", "messages": HELLO},
    "/tokenize": {"prompt": "ab"},
    "/detokenize": {"tokens": [97]},
}
ANTHROPIC = {
    400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 405: "invalid_request_error",
    408: "timeout_error", 413: "request_too_large", 415: "invalid_request_error", 429: "rate_limit_error",
    500: "api_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip
INVALID, DOWN, TIMEOUT = "invalid_request_error", "service_unavailable", "timeout"
RETRY, NEVER = {"retry-after": "[1-5]"}, {"x-should-retry": "false"}

# raw body, headers → status, type, code, param, headers of the answer as patterns
BODIES = {
    "cut JSON": (b'{"a', JSON, 400, INVALID, "invalid_json", None, {}),
    "empty": (b"", JSON, 400, INVALID, "invalid_json", None, {}),
    "no object": (b"[1]", JSON, 400, INVALID, "invalid_type", None, {}),
    "bad UTF-8": (b'{"a": "\xff"}', JSON, 400, INVALID, "invalid_json", None, {}),
    "NaN": (b'{"temperature": NaN}', JSON, 400, INVALID, "invalid_json", None, {}),
    "lone surrogate": (b'{"a": "\\ud800"}', JSON, 400, INVALID, "invalid_json", None, {}),
    "200,000 nested": (b'{"a":' + b"[" * 9_000 + b"}", JSON, 400, INVALID, "invalid_json", None, {}),
    "5000 digits": (b'{"a": ' + b"1" * 5000 + b"}", JSON, 400, INVALID, "invalid_json", None, {}),
    "no field": (b"{}", JSON, 400, INVALID, "missing_required_parameter", ".+", {}),
    "model of a wrong type": (b'{"model": 3}', JSON, 400, INVALID, "(invalid_type|missing_required_parameter)", ".+", {}),
    "huge": (b" " * 50_000, JSON, 413, INVALID, "request_too_large", None, {"connection": "close"}),
    "a form": (b"a=b", {"content-type": "application/x-www-form-urlencoded"}, 415, INVALID, "unsupported_media_type", None, {}),
    "no type": (b"{}", {}, 415, INVALID, "unsupported_media_type", None, {}),
    "gzip": (b"\x1f\x8b", {**JSON, "content-encoding": "gzip"}, 415, INVALID, "unsupported_media_type", None, {}),
}


def late(server, **limits):
    server.fake.first_delay = 30
    for name, value in limits.items():
        setattr(server.limits, name, value)


def endless(server, **limits):
    server.fake.script, server.fake.delay = (lambda request: [97] * 10_000), 0.01
    late(server, **limits)
    server.fake.first_delay = 0


def failing(error, after=0):
    def change(server):
        server.fake.failure, server.fake.fail_after = error, after

    return change


# change of the server → status, type, code, headers
STATES = {
    "no first token": (lambda s: late(s, queue_timeout_s=0.05), 503, DOWN, "engine_overloaded", RETRY),
    "deadline before a token": (lambda s: late(s, queue_timeout_s=None, request_timeout_s=0.05),
                                408, TIMEOUT, "request_timeout", NEVER),
    "deadline after a token": (lambda s: endless(s, request_timeout_s=0.1), 504, TIMEOUT, "deadline_exceeded", NEVER),
    "loading": (failing(NotReady("x")), 503, DOWN, "model_loading", RETRY),
    "the replica's queue is full": (failing(Overloaded("x")), 503, DOWN, "engine_overloaded", RETRY),
    "the engine is dead": (failing(EngineDead("x")), 503, DOWN, "replica_lost", RETRY),
    "the replica died half-way": (failing(ReplicaLost("x"), 2), 503, DOWN, "replica_lost", NEVER),
    "a bug": (failing(ZeroDivisionError("/secret/path")), 500, "server_error", None, {}),
}  # fmt: skip


def check(answer, path, status, kind, code, param=None, headers=None):
    """The whole answer to a request that went wrong; code and param: patterns."""
    got, answered, raw = answer
    body = json.loads(raw)
    assert got == status, (got, body)
    assert answered["content-type"] == "application/json" and int(answered["content-length"]) == len(raw)
    for name, pattern in {"x-request-id": "[!-~]{1,128}", **(headers or {})}.items():
        assert re.fullmatch(pattern, answered[name]), (name, answered)
    error = body["error"]
    assert error["message"] and "secret" not in error["message"]
    if path.startswith("/v1/messages"):
        assert list(body) == ["type", "error", "request_id"] and list(error) == ["type", "message"]
        assert (body["type"], body["request_id"]) == ("error", answered["x-request-id"])
        assert error["type"] == ANTHROPIC[status]
        return
    assert list(body) == ["error"] and list(error) == ["message", "type", "param", "code"]
    assert error["type"] == kind
    for value, pattern in ((error["code"], code), (error["param"], param)):
        assert value == pattern if pattern is None or value is None else re.fullmatch(pattern, value), error


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("name", BODIES)
def test_bodies(server, path, name):
    body, headers, *expected = BODIES[name]
    check(server.raw("POST", path, body, headers), path, *expected)
    assert not server.fake.requests


BEFORE = [name for name in STATES if not re.search("after|half-way", name)]


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize("name, stream", [*((name, False) for name in STATES), *((name, True) for name in BEFORE)])
def test_states_of_the_server(server, path, name, stream):
    """A stream says the same as plain JSON while nothing has been sent of it; later it has an event (test_answers.py)."""
    change, *expected, headers = STATES[name]
    change(server)
    body = {**GENERATING[path], "stream": stream}
    check(server.raw("POST", path, body), path, *expected, headers=headers)


@pytest.mark.parametrize("path", POSTS)
def test_models_urls_and_methods(server, path):
    check(server.raw("POST", path, {**POSTS[path], "model": "gpt-9"}), path, 404, INVALID, "model_not_found", "model")
    check(server.raw("POST", path + "/", POSTS[path]), path, 404, INVALID, "unknown_url")
    for method in ("GET", "PUT", "DELETE", "TRACE", "QUERY"):
        check(server.raw(method, path), path, 405, INVALID, "method_not_allowed", headers={"allow": "POST"})


@pytest.mark.parametrize("path", POSTS)
def test_keys_and_their_limits(fresh_server, path):
    alice = ApiKey(name="alice", key="sk-alice", requests_per_minute=1)
    server = fresh_server(access=Access(keys=[alice, ApiKey(name="bob", key="sk-bob", concurrent_requests=1)]))
    for headers in (JSON, {**JSON, "authorization": "Bearer wrong"}):
        answer = server.raw("POST", path, POSTS[path], headers)
        check(answer, path, 401, INVALID, "invalid_api_key", headers={"www-authenticate": "Bearer"})
    headers = {**JSON, "x-api-key": "sk-alice"}
    assert server.raw("POST", path, POSTS[path], headers)[0] == 200
    limits = {"retry-after": "[0-9]+", "x-ratelimit-limit-requests": "1", "x-ratelimit-remaining-requests": "0",
              "x-ratelimit-reset-requests": "[0-9ms.]+"}  # fmt: skip
    check(server.raw("POST", path, POSTS[path], headers), path, 429, "rate_limit_error", "rate_limit_exceeded", headers=limits)


@pytest.mark.parametrize("path", POSTS)
def test_a_server_that_is_full_or_ends(fresh_server, path):
    """Nothing is read then, not even to be refused; what asks no engine is still answered while a model loads."""
    server = fresh_server()
    server.gate._max_queued = server.gate._limit = -server.INFO.max_seqs
    check(server.raw("POST", path, b"{", JSON), path, 503, DOWN, "engine_overloaded", headers=RETRY)
    server.gate.drain()
    check(server.raw("POST", path, b"{", JSON), path, 503, DOWN, "draining", headers=RETRY)


@pytest.mark.parametrize("path", POSTS)
def test_a_server_that_never_had_a_model(fresh_server, path):
    server = fresh_server()
    server.fake.ready = False
    check(server.raw("POST", path, POSTS[path]), path, 503, DOWN, "model_loading", headers=RETRY)


# section 3.2 of the contract: what depends on the fields. Others are in test_errors.py, where param and words are checked
FIELDS = {
    "NUL in a text": ({"prompt": "a\0b"}, 200, None),
    "4.0 is an integer": ({"max_tokens": 4.0}, 200, None),
    "'4' is none": ({"max_tokens": "4"}, 400, "invalid_type"),
    "true is no number": ({"max_tokens": True}, 400, "invalid_type"),
    "max_tokens 0": ({"max_tokens": 0}, 400, "integer_below_min_value"),
    "max_tokens -1": ({"max_tokens": -1}, 400, "integer_below_min_value"),
    "max_tokens within the context is clamped": ({"max_tokens": 256, "prompt": "z" * 100}, 200, None),
    "max_tokens beyond it": ({"max_tokens": 257}, 400, "integer_above_max_value"),
    "prompt too long": ({"prompt": "z" * 300}, 400, "context_length_exceeded"),
    "temperature 3": ({"temperature": 3}, 400, "decimal_above_max_value"),
    "temperature -1": ({"temperature": -1}, 400, "decimal_below_min_value"),
    "top_p 0 is greedy": ({"top_p": 0}, 200, None),
    "n 0": ({"n": 0}, 400, "integer_below_min_value"),
    "n 129": ({"n": 129}, 400, "integer_above_max_value"),
    "logit_bias of an id that is none": ({"logit_bias": {"999": 1}}, 400, "invalid_value"),
    "5 stops": ({"stop": list("abcde")}, 400, "array_above_max_length"),
    "stream_options without stream": ({"stream_options": {"include_usage": True}}, 400, "invalid_value"),
    "unknown fields": ({"num_ctx": 4096, "mirostat": {"a": [1]}}, 200, None),
    "null is the default": ({"max_tokens": None, "n": None, "stop": None, "seed": None, "stream": None}, 200, None),
}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("name", FIELDS)
def test_fields(server, path, name):
    fields, status, code = FIELDS[name]
    answer = server.raw("POST", path, {"prompt": "a", **fields})
    if status == 200:
        assert answer[0] == 200, answer
        assert len(server.fake.requests) == 1
    else:
        check(answer, path, status, INVALID, code, next(iter(fields)))
        assert not server.fake.requests


RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
BAD_SCHEMA = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
LONG = "z" * 300
# the same of section 3.2 at the other two: path, fields → status, code, param
DIALECTS = [
    (RESPONSES, {"input": "a\0b"}, 200, None, None),
    (RESPONSES, {"max_output_tokens": 4.0, "num_ctx": 1, "temperature": None, "top_p": 0}, 200, None, None),
    (RESPONSES, {"max_output_tokens": "4"}, 400, "invalid_type", "max_output_tokens"),
    (RESPONSES, {"max_output_tokens": True}, 400, "invalid_type", "max_output_tokens"),
    (RESPONSES, {"max_output_tokens": 0}, 400, "integer_below_min_value", "max_output_tokens"),
    (RESPONSES, {"max_output_tokens": -1}, 400, "integer_below_min_value", "max_output_tokens"),
    (RESPONSES, {"max_output_tokens": 257}, 400, "integer_above_max_value", "max_output_tokens"),
    (RESPONSES, {"max_output_tokens": 256}, 200, None, None),
    (RESPONSES, {"input": LONG}, 400, "context_length_exceeded", "input"),
    (RESPONSES, {"input": []}, 400, "empty_array", "input"),
    (RESPONSES, {"input": 3}, 400, "invalid_type", "input"),
    (RESPONSES, {"input": [{"role": "robot", "content": "a"}]}, 400, "invalid_value", r"input\[0\]\.role"),
    (RESPONSES, {"temperature": 3}, 400, "decimal_above_max_value", "temperature"),
    (RESPONSES, {"temperature": -1}, 400, "decimal_below_min_value", "temperature"),
    (RESPONSES, {"logit_bias": {"999": 1}}, 400, "invalid_value", "logit_bias"),
    (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "a", "schema": BAD_SCHEMA}}}, 400, "invalid_json_schema",
     r"text\.format\.schema"),
    (MESSAGES, {"messages": [{"role": "user", "content": "a\0b"}]}, 200, None, None),
    (MESSAGES, {"max_tokens": 4.0, "num_ctx": 1, "temperature": None, "top_p": 0}, 200, None, None),
    (MESSAGES, {"max_tokens": "4"}, 400, None, "max_tokens"),
    (MESSAGES, {"max_tokens": True}, 400, None, "max_tokens"),
    (MESSAGES, {"max_tokens": 0}, 400, None, "max_tokens"),
    (MESSAGES, {"max_tokens": -1}, 400, None, "max_tokens"),
    (MESSAGES, {"max_tokens": 257}, 200, None, None),  # its clients make one up, see fields.py
    (MESSAGES, {"messages": [{"role": "user", "content": LONG}]}, 400, None, "messages"),
    (MESSAGES, {"messages": []}, 400, None, "messages"),
    (MESSAGES, {"messages": "hi"}, 400, None, "messages"),
    (MESSAGES, {"messages": [{"role": "robot", "content": "a"}]}, 400, None, None),
    (MESSAGES, {"temperature": 3}, 400, None, "temperature"),
    (MESSAGES, {"temperature": -1}, 400, None, "temperature"),
    (MESSAGES, {"logit_bias": {"999": 1}}, 400, None, "logit_bias"),
    (MESSAGES, {"stop_sequences": list("abcde")}, 400, None, "stop_sequences"),
    (MESSAGES, {"output_config": {"format": {"type": "json_schema", "schema": BAD_SCHEMA}}}, 400, None, "#/properties/a"),
]


@pytest.mark.parametrize(("path", "fields", "status", "code", "param"), DIALECTS, ids=str)
@pytest.mark.parametrize("stream", [False, True])
def test_fields_of_the_other_two(server, path, fields, status, code, param, stream):
    """Anthropic's envelope has no param: its message names the field."""
    answer = server.raw("POST", path, {**GENERATING[path], **fields, "stream": stream})
    if status == 200:
        assert answer[0] == 200 and len(server.fake.requests) == 1, answer
        return
    check(answer, path, status, INVALID, code, param)
    assert not server.fake.requests
    if path == MESSAGES:
        assert (param or "robot") in json.loads(answer[2])["error"]["message"]


STRICT = {"name": "f", "strict": True, "parameters": BAD_SCHEMA}
SCHEMAS = [
    ("/v1/chat/completions", {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": BAD_SCHEMA}}}),
    ("/v1/completions", {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": BAD_SCHEMA}}}),
    ("/v1/chat/completions", {"tools": [{"type": "function", "function": STRICT}]}),
    (RESPONSES, {"tools": [{"type": "function", **STRICT}]}),
    (MESSAGES, {"tools": [{"name": "f", "strict": True, "input_schema": BAD_SCHEMA}]}),
    (MESSAGES, {"structured_outputs": {"json": BAD_SCHEMA}}),
]


@pytest.mark.parametrize(("path", "fields"), SCHEMAS)
def test_invalid_schemas_are_told_with_their_path(server, path, fields):
    answer = server.raw("POST", path, {**GENERATING[path], **fields})
    check(answer, path, 400, INVALID, "invalid_json_schema", ".+")
    assert "#/properties/a/uniqueItems" in json.loads(answer[2])["error"]["message"]


@pytest.mark.parametrize("path", POSTS)
def test_request_ids_that_no_log_should_hold_are_replaced(server, path):
    for given in ("x" * 5000, "a b", "\x80"):
        status, headers, _ = server.raw("POST", path, POSTS[path], {**JSON, "x-request-id": given})
        assert status == 200 and re.fullmatch("[!-~]{1,128}", headers["x-request-id"]) and headers["x-request-id"] != given


def test_no_answer_is_a_422(server):
    for path, body in POSTS.items():
        for field in ("model", "messages", "prompt", "tokens", "input", "max_tokens", "temperature", "stop"):
            for value in (3, "a", [], {}, [[]], True, -1, 1e308):
                assert server.raw("POST", path, {**body, field: value})[0] in (200, 400, 404), (path, field, value)
    server.wait_idle()
