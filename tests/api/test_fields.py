"""The field table and the request models say the same, and every refused field is refused."""

import pytest

from deployments.protocol.anthropic_request import AnthropicRequest, parse_anthropic
from deployments.protocol.body import parse_object
from deployments.protocol.errors import ApiError
from deployments.protocol.fields import BY_NAME, FIELDS
from deployments.protocol.limits import Limits
from deployments.protocol.requests import ChatRequest, CompletionRequest, parse_chat, parse_completion
from deployments.protocol.response_request import ResponseRequest, parse_response
from deployments.protocol.tokens import DetokenizeRequest, TokenizeRequest, parse_detokenize, parse_tokenize


def tokenize(body, limits):
    return parse_tokenize(body)


def detokenize(body, limits):
    return parse_detokenize(body)


MODELS = {
    "chat": (ChatRequest, parse_chat, {"prompt": "a"}),
    "completions": (CompletionRequest, parse_completion, {"prompt": "a"}),
    "responses": (ResponseRequest, parse_response, {"input": "a"}),
    "tokenize": (TokenizeRequest, tokenize, {"prompt": "a"}),
    "detokenize": (DetokenizeRequest, detokenize, {"tokens": [1]}),
    "messages": (AnthropicRequest, parse_anthropic,
                 {"model": "a", "max_tokens": 1, "messages": [{"role": "user", "content": "a"}]}),
}  # fmt: skip


@pytest.mark.parametrize("endpoint", MODELS)
def test_the_table_lists_exactly_what_the_model_takes(endpoint):
    served = {name for name, field in BY_NAME[endpoint].items() if field.status == "served"}
    assert served == set(MODELS[endpoint][0].model_fields)


def test_no_field_is_listed_twice():
    for endpoint, fields in BY_NAME.items():
        assert len(fields) == sum(endpoint in field.endpoints for field in FIELDS)


@pytest.mark.parametrize("endpoint", MODELS)
def test_refused_and_ignored_fields(endpoint):
    _, parse, base = MODELS[endpoint]
    for field in BY_NAME[endpoint].values():
        if field.status == "served":
            continue
        body = {**base, field.name: {"some": "thing"}}
        if field.status == "ignored":
            assert parse(body, Limits())[-1] == []  # known, so not counted as unknown
            continue
        with pytest.raises(ApiError) as caught:
            parse(body, Limits())
        error = caught.value
        assert (error.status, error.code, error.param) == (400, "unsupported_parameter", field.name)
        assert field.note and field.note in error.message  # says what to do instead
        for value in (None, *field.harmless):
            parse({**base, field.name: value}, Limits())


@pytest.mark.parametrize("text, ok", [
    ("-9223372036854775808", True), ("-9223372036854775809", False), ("1e3", True),
    ("9223372036854775807", True), ("9223372036854775808", False), ("-1e30", False),
])  # fmt: skip
def test_integers_are_exact(text, ok):
    body = parse_object(b'{"prompt": "a", "seed": ' + text.encode() + b"}")
    if ok:
        assert parse_chat(body, Limits())[0].seed == int(float(text) if "e" in text else text)
        return
    with pytest.raises(ApiError) as caught:
        parse_chat(body, Limits())
    assert caught.value.param == "seed" and caught.value.code in ("integer_below_min_value", "integer_above_max_value")


def test_null_is_the_default_inside_objects_too():
    call = {"id": "a", "type": None, "function": {"name": "f", "arguments": None}}
    messages = [{"role": "assistant", "content": "x", "name": None, "tool_calls": [call]}]
    request, _ = parse_chat({"messages": messages, "stream": True, "stream_options": {"include_usage": None}}, Limits())
    assert request.messages[0].tool_calls[0].function.arguments == "" and not request.include_usage
