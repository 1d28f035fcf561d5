"""Every way a request can be wrong, and what the official client makes of the answer."""

import json
import re
import socket

import openai
import pytest

MESSAGES = [{"role": "user", "content": "hi"}]
BASE = {"messages": MESSAGES}
F = {"type": "function", "function": {"name": "f"}}


def check(server, body, status, code, param=None, path="/v1/chat/completions", words=""):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    got, headers, answer = server.raw("POST", path, raw)
    assert headers["content-type"] == "application/json"
    error = json.loads(answer)
    assert list(error) == ["error"] and list(error["error"]) == ["message", "type", "param", "code"]
    error = error["error"]
    assert (got, error["code"], error["param"]) == (status, code, param), error
    assert error["type"] == "invalid_request_error" and words in error["message"], error
    assert not server.fake.requests


# raw bodies: api.md 3.2
RAW = {
    "cut": b'{"messages": [',
    "empty": b"",
    "bad utf-8": b'{"messages": "\xff"}',
    "NaN": b'{"temperature": NaN}',
    "Infinity": b'{"temperature": -Infinity}',
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "lone surrogate in a key": b'{"\\udfff": 1}',
    "deep": b'{"messages":' + b"[" * 9000 + b"]" * 9000 + b"}",
    "65 deep": b'{"a":' * 64 + b"{}" + b"}" * 64,
    "5000 digits": b'{"max_tokens": ' + b"1" * 5000 + b"}",
    "trailing": b"{} {}",
}


@pytest.mark.parametrize("name", RAW)
def test_bodies_that_are_not_json(server, name):
    check(server, RAW[name], 400, "invalid_json")


def test_64_levels_are_accepted(server):
    body = b'{"prompt": "a", "x":' + b'{"a":' * 62 + b"{}" + b"}" * 62 + b"}"
    assert server.raw("POST", "/v1/chat/completions", body)[0] == 200


@pytest.mark.parametrize("body", [b"[]", b'"text"', b"3", b"null", b"true"])
def test_bodies_that_are_not_objects(server, body):
    check(server, body, 400, "invalid_type")


CHAT = [
    ({}, "missing_required_parameter", "messages"),
    ({"messages": None}, "missing_required_parameter", "messages"),
    ({"messages": []}, "empty_array", "messages"),
    ({"messages": "hi"}, "invalid_type", "messages"),
    ({"messages": ["hi"]}, "invalid_type", "messages[0]"),
    ({"messages": [{"content": "a"}]}, "missing_required_parameter", "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "missing_required_parameter", "messages[0].content"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "invalid_value", "messages[0].role"),
    ({"messages": [{"role": "user", "content": 3}]}, "invalid_type", "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "unsupported_content_part",
        "messages[0].content[0]",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "invalid_type",
        "messages[0].content[0].text",
    ),
    (
        {"messages": [{"role": "tool", "content": "a", "tool_call_id": "x"}]},
        "invalid_value",
        "messages[0].tool_call_id",
    ),
    ({**BASE, "prompt": "a"}, "invalid_value", "prompt"),
    ({**BASE, "model": 3}, "invalid_type", "model"),
    ({**BASE, "max_tokens": "4"}, "invalid_type", "max_tokens"),
    ({**BASE, "max_tokens": True}, "invalid_type", "max_tokens"),
    ({**BASE, "max_tokens": 4.5}, "invalid_type", "max_tokens"),
    ({**BASE, "max_tokens": 0}, "integer_below_min_value", "max_tokens"),
    ({**BASE, "max_tokens": -1}, "integer_below_min_value", "max_tokens"),
    ({**BASE, "max_tokens": 10**30}, "integer_above_max_value", "max_tokens"),
    ({**BASE, "max_completion_tokens": 0}, "integer_below_min_value", "max_completion_tokens"),
    ({**BASE, "max_completion_tokens": 300}, "integer_above_max_value", "max_completion_tokens"),
    ({**BASE, "max_tokens": 0, "max_completion_tokens": 3}, "integer_below_min_value", "max_tokens"),
    ({**BASE, "max_tokens": 300, "max_completion_tokens": 3}, "integer_above_max_value", "max_tokens"),
    ({**BASE, "temperature": 3}, "decimal_above_max_value", "temperature"),
    ({**BASE, "temperature": -1}, "decimal_below_min_value", "temperature"),
    ({**BASE, "temperature": True}, "invalid_type", "temperature"),
    ({**BASE, "temperature": "1"}, "invalid_type", "temperature"),
    ({**BASE, "top_p": 1.5}, "decimal_above_max_value", "top_p"),
    ({**BASE, "n": 0}, "integer_below_min_value", "n"),
    ({**BASE, "n": 9}, "integer_above_max_value", "n"),
    ({**BASE, "stop": ["a", "b", "c", "d", "e"]}, "array_above_max_length", "stop"),
    ({**BASE, "stop": ""}, "invalid_value", "stop"),
    ({**BASE, "stop": [1]}, "invalid_type", "stop"),
    ({**BASE, "stream": 1}, "invalid_type", "stream"),
    ({**BASE, "stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
    ({**BASE, "stream": True, "stream_options": {"include_usage": 1}}, "invalid_type", "stream_options.include_usage"),
    ({**BASE, "seed": 2**63}, "integer_above_max_value", "seed"),
    ({**BASE, "seed": 1.5}, "invalid_type", "seed"),
    ({**BASE, "logprobs": 1}, "invalid_type", "logprobs"),
    ({**BASE, "top_logprobs": 1}, "invalid_value", "top_logprobs"),
    ({**BASE, "logprobs": True, "top_logprobs": 21}, "integer_above_max_value", "top_logprobs"),
    ({**BASE, "logit_bias": {"a": 1}}, "invalid_value", "logit_bias"),
    ({**BASE, "logit_bias": {"5": 101}}, "invalid_value", "logit_bias"),
    ({**BASE, "logit_bias": {"5": True}}, "invalid_type", "logit_bias"),
    ({**BASE, "logit_bias": {"999": 1}}, "invalid_value", "logit_bias"),
    ({**BASE, "presence_penalty": 2.5}, "decimal_above_max_value", "presence_penalty"),
    ({**BASE, "min_p": -0.1}, "decimal_below_min_value", "min_p"),
    ({**BASE, "repetition_penalty": 0}, "decimal_below_min_value", "repetition_penalty"),
    ({**BASE, "repetition_penalty": 0.001}, "decimal_below_min_value", "repetition_penalty"),
    ({**BASE, "stop_token_ids": [999]}, "invalid_value", "stop_token_ids"),
    ({**BASE, "stop_token_ids": [-1]}, "integer_below_min_value", "stop_token_ids[0]"),
    ({**BASE, "min_tokens": 5, "max_tokens": 4}, "invalid_value", "min_tokens"),
    ({**BASE, "chat_template_kwargs": {"messages": []}}, "invalid_value", "chat_template_kwargs"),
    ({**BASE, "chat_template_kwargs": {"self": 1}}, "invalid_value", "chat_template_kwargs"),
    ({**BASE, "response_format": {"type": "json_object", "schema": {"not": {}}}}, "invalid_json_schema",
     "response_format.schema"),
    ({**BASE, "response_format": {"type": "json"}}, "invalid_value", "response_format.type"),
    ({**BASE, "response_format": {"type": "json_schema"}}, "missing_required_parameter", "response_format.json_schema"),
    ({**BASE, "tools": [{"type": "function"}]}, "missing_required_parameter", "tools[0].function"),
    ({**BASE, "tools": [{"type": "custom", "custom": {"name": "f"}}]}, "invalid_value", "tools[0].type"),
    ({**BASE, "tools": [{"type": "function", "function": {"name": "a b"}}]}, "invalid_value", "tools[0].function.name"),
    ({**BASE, "tools": [F, F]}, "invalid_value", "tools"),
    ({**BASE, "tools": [F] * 129}, "array_above_max_length", "tools"),
    ({**BASE, "tool_choice": "required"}, "invalid_value", "tool_choice"),
    ({**BASE, "tools": [F], "tool_choice": "any"}, "invalid_value", "tool_choice"),
    ({**BASE, "tools": [F], "tool_choice": 3}, "invalid_type", "tool_choice"),
    ({**BASE, "tools": [F], "tool_choice": {"type": "function"}}, "invalid_value", "tool_choice"),
    ({**BASE, "tools": [F], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "invalid_value", "tool_choice"),
    ({**BASE, "tools": [F], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto"}}}, "invalid_value",
     "tool_choice"),
    ({**BASE, "tools": [F], "parallel_tool_calls": 1}, "invalid_type", "parallel_tool_calls"),
    ({**BASE, "functions": [{"name": "f"}]}, "unsupported_parameter", "functions"),
    ({**BASE, "function_call": {"name": "f"}}, "unsupported_parameter", "function_call"),
    ({**BASE, "functions": [{}]}, "unsupported_parameter", "functions"),
    ({**BASE, "structured_outputs": {"regex": "(?=a)"}}, "invalid_grammar", "structured_outputs.regex"),
    ({**BASE, "structured_outputs": {"regex": "a", "choice": ["a"]}}, "invalid_value", "structured_outputs"),
    ({**BASE, "guided_json": {}}, "unsupported_parameter", "guided_json"),
    ({**BASE, "modalities": ["audio"]}, "unsupported_parameter", "modalities"),
    ({**BASE, "chat_template": "x"}, "unsupported_parameter", "chat_template"),
]


@pytest.mark.parametrize("body, code, param", CHAT, ids=[f"{c}-{p}-{i}" for i, (_, c, p) in enumerate(CHAT)])
def test_chat_bodies(server, body, code, param):
    check(server, body, 400, code, param)


TEXT = [
    ({}, "missing_required_parameter", "prompt"),
    ({"prompt": ""}, "invalid_value", "prompt"),
    ({"prompt": []}, "empty_array", "prompt"),
    ({"prompt": [[]]}, "empty_array", "prompt"),
    ({"prompt": [True]}, "invalid_type", "prompt"),
    ({"prompt": [1, "a"]}, "invalid_type", "prompt"),
    ({"prompt": ["a", [1]]}, "invalid_value", "prompt"),
    ({"prompt": {"a": 1}}, "invalid_type", "prompt"),
    ({"prompt": [999]}, "invalid_value", "prompt"),
    ({"prompt": [-1]}, "invalid_value", "prompt"),
    ({"prompt": ["a"] * 17}, "invalid_value", "prompt"),  # more than slots and queue hold
    ({"prompt": ["a"] * 1025}, "array_above_max_length", "prompt"),
    ({"prompt": "a", "max_tokens": 0}, "integer_below_min_value", "max_tokens"),
    ({"prompt": "a", "logprobs": 21}, "integer_above_max_value", "logprobs"),
    ({"prompt": "a", "logprobs": True}, "invalid_type", "logprobs"),
    ({"prompt": "a", "best_of": 3}, "unsupported_parameter", "best_of"),
    ({"prompt": "a", "suffix": "b"}, "unsupported_parameter", "suffix"),
]


@pytest.mark.parametrize("body, code, param", TEXT, ids=[f"{c}-{p}-{i}" for i, (_, c, p) in enumerate(TEXT)])
def test_completion_bodies(server, body, code, param):
    check(server, body, 400, code, param, "/v1/completions")


def test_openais_words(server):
    body = {**BASE, "stop": ["a", "b", "c", "d", "e"]}
    words = "Invalid 'stop': array too long. Expected an array with maximum length 4, but got an array with length 5 "
    check(server, body, 400, "array_above_max_length", "stop", words=words)
    words = "Invalid type for 'temperature': expected a decimal, but got a string instead."
    check(server, {**BASE, "temperature": "x"}, 400, "invalid_type", "temperature", words=words)
    words = "Invalid 'n': integer below minimum value. Expected a value >= 1, but got 0 instead."
    check(server, {**BASE, "n": 0}, 400, "integer_below_min_value", "n", words=words)


@pytest.mark.parametrize("text", ["y" * 300, "x" * 9000], ids=["tokenised", "refused on its length"])
def test_a_prompt_that_is_too_long(server, text):
    for body, path, noun in [
        ({"messages": [{"role": "user", "content": text}]}, "/v1/chat/completions", "messages"),
        ({"prompt": text}, "/v1/completions", "prompt"),
    ]:
        words = "This model's maximum context length is 256 tokens. However, your "
        check(server, body, 400, "context_length_exceeded", noun, path, words)


def test_unknown_fields_are_ignored_and_counted(server):
    before = server.app.state.service.metrics.unknown_fields
    assert server.chat(num_ctx=4096, mirostat=2, user="u", store=True)[0] == 200
    assert server.app.state.service.metrics.unknown_fields == before + 2


def test_unknown_model(server):
    check(server, {**BASE, "model": "gpt-9"}, 404, "model_not_found", "model", words="'acme/tiny'")
    with pytest.raises(openai.NotFoundError):
        server.client().models.retrieve("acme/huge")


def test_the_clients_exceptions(server):
    client = server.client()
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="acme/tiny", messages=MESSAGES, temperature=9)
    assert caught.value.code == "decimal_above_max_value" and caught.value.param == "temperature"
    assert caught.value.request_id
    with pytest.raises(openai.BadRequestError):  # before the stream begins: not an event
        client.chat.completions.create(model="acme/tiny", messages=MESSAGES, n=0, stream=True)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", None])
def test_other_content_types(server, content_type):
    headers = {"content-type": content_type} if content_type else {"accept": "*/*"}
    status, _, body = server.raw("POST", "/v1/chat/completions", b'{"prompt": "a"}', headers)
    assert status == 415 and json.loads(body)["error"]["code"] == "unsupported_media_type"


def test_content_type_with_parameters(server):
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert server.raw("POST", "/v1/chat/completions", b'{"prompt": "a"}', headers)[0] == 200


def test_bodies_over_the_limit(server):
    body = {"prompt": "a" * 40_000}
    status, headers, answer = server.raw("POST", "/v1/chat/completions", body)
    assert status == 413 and json.loads(answer)["error"]["code"] == "request_too_large"
    assert headers["connection"] == "close"
    parts = (b"1000\r\n" + b"a" * 4096 + b"\r\n") * 10 + b"0\r\n\r\n"
    head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    head += b"transfer-encoding: chunked\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 3) as connection:  # less than DRAIN_TIMEOUT_S
        connection.sendall(head + b"\r\n" + parts)  # no content-length to be refused by
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_unknown_urls_and_wrong_methods(server):
    for path in ("/v1/nothing", "/v1/chat/completions/", "/redoc"):
        status, _, body = server.raw("GET", path)
        assert status == 404 and json.loads(body)["error"]["code"] == "unknown_url"
    for method, path, allowed in [
        ("GET", "/v1/chat/completions", {"POST"}),
        ("TRACE", "/v1/completions", {"POST"}),
        ("POST", "/v1/models", {"GET", "HEAD"}),
    ]:
        status, headers, body = server.raw(method, path)
        assert status == 405 and json.loads(body)["error"]["code"] == "method_not_allowed"
        assert set(re.split(r", *", headers["allow"])) == allowed


def test_a_bug_is_a_fixed_text(server, caplog):
    def explode(request):
        raise ZeroDivisionError("secret path /root/x")

    server.fake.script = explode
    status, _, body = server.raw("POST", "/v1/chat/completions", BASE)
    assert status == 500 and b"secret" not in body
    assert json.loads(body)["error"] == {
        "message": "The server had an error while processing your request.",
        "type": "server_error",
        "param": None,
        "code": None,
    }
    with pytest.raises(openai.InternalServerError):
        server.client().chat.completions.create(model="acme/tiny", messages=MESSAGES)
