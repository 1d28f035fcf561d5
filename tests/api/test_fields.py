"""The field table and the request models say the same, and every refused field is refused."""

import pytest

from deployments.protocol.anthropic_request import AnthropicRequest, parse_anthropic
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
