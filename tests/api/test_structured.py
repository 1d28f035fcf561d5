"""Structured output over HTTP: an engine that obeys grammars and else chooses at random, and every way to ask for one."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest
from pydantic import BaseModel

from model_core.engine.request import UNANSWERABLE, Request, TokenEvent
from model_core.grammar.matcher import Compiled, Matcher, Vocabulary

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12},
                   "ages": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
                   "kind": {"enum": ["a", "b"]}},
    "required": ["name", "ages", "kind"],
    "additionalProperties": False,
}  # fmt: skip
CHAT, TEXT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 150},
    TEXT: {"prompt": "hi", "max_tokens": 150},
    RESPONSES: {"input": "hi", "max_output_tokens": 150},
    MESSAGES: {"model": "acme/tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 150},
}
AS_FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}


def vocabulary_of(server):
    tokenizer = server.app.state.service.tokenizer
    return Vocabulary(tokenizer.byte_table(skip_special_tokens=True), tokenizer.vocab_size, server.INFO.eos_ids)


def obey(server, vocabulary):
    """The server, whose engine follows the grammar of a request."""

    def script(request: Request) -> list[int]:
        assert request.params.grammar is not None, "the grammar did not travel"
        stops = frozenset(server.INFO.eos_ids)
        matcher = Matcher(Compiled.of(request.params.grammar, vocabulary), stops)
        chance, output = random.Random(request.params.seed or 0), list[int]()
        masks = np.zeros((1, vocabulary.words), dtype=np.int32)
        while len(output) < request.params.max_tokens and not (output and output[-1] in stops):
            matcher.follow(output)
            matcher.fill(masks, 0)
            ids = np.flatnonzero(np.unpackbits(masks.view(np.uint8)[0], bitorder="little")[: vocabulary.size]).tolist()
            weights = [5 if i in stops or chr(i % 256) in '"}]' else 1 if i < 128 or i > server.IM_END else 0.01 for i in ids]
            output.append(chance.choices(ids, weights)[0])
        return output

    server.fake.script = script
    return server


@pytest.fixture
def obedient(server):
    return obey(server, vocabulary_of(server))


def post(server, path: str, **fields: Any) -> tuple[int, dict[str, Any]]:
    status, _, raw = server.raw("POST", path, {**BODIES[path], **fields})
    return status, json.loads(raw)


def text_of(path: str, answer: dict[str, Any]) -> str:
    if path == CHAT:
        return answer["choices"][0]["message"]["content"]
    if path == TEXT:
        return answer["choices"][0]["text"]
    return (answer["output"][0] if path == RESPONSES else answer)["content"][0]["text"]


ASKED = [
    (CHAT, {"response_format": AS_FORMAT}),
    (TEXT, {"response_format": AS_FORMAT}),
    (CHAT, {"response_format": {"type": "json_object", "schema": SCHEMA}}),
    (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "person", "schema": SCHEMA}}}),
    (MESSAGES, {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}),
    *((path, {"structured_outputs": {"json": SCHEMA}}) for path in BODIES),
    (CHAT, {"structured_outputs": {"json": json.dumps(SCHEMA)}}),
]


@pytest.mark.parametrize(("path", "fields"), ASKED)
def test_a_schema_is_held(obedient, path, fields) -> None:
    for seed in range(5):
        status, answer = post(obedient, path, seed=seed, **fields)
        assert status == 200, answer
        jsonschema.validate(json.loads(text_of(path, answer)), SCHEMA)
    if "text" in fields:
        assert answer["text"]["format"] == {**fields["text"]["format"], "description": None, "strict": False}


@pytest.mark.parametrize(("fields", "valid"), [
    ({"response_format": {"type": "json_object"}}, lambda text: isinstance(json.loads(text), dict)),
    ({"structured_outputs": {"json_object": True}}, lambda text: isinstance(json.loads(text), dict)),
    ({"structured_outputs": {"regex": r"[a-c]{2}\d"}}, lambda text: len(text) == 3 and text[2].isdigit()),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, lambda text: text in ("yes", "no")),
    ({"structured_outputs": {"grammar": 'root ::= "x" root | "y"'}}, lambda text: text.strip("x") == "y"),
])  # fmt: skip
def test_every_other_kind(obedient, fields, valid) -> None:
    for path in (CHAT, TEXT):
        status, answer = post(obedient, path, **fields)
        assert status == 200 and answer["choices"][0]["finish_reason"] == "stop" and valid(text_of(path, answer))


def test_streams_choices_and_cut_answers(obedient) -> None:
    with obedient.client() as client:
        messages = [{"role": "user", "content": "hi"}]
        wishes: dict[str, Any] = dict(stream=True, n=2, seed=3, response_format=AS_FORMAT)
        chunks = client.chat.completions.create(model="", messages=messages, **wishes)
        texts, finishes = ["", ""], {}
        for chunk in chunks:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                finishes[choice.index] = choice.finish_reason
    assert texts[0] != texts[1] and set(finishes.values()) == {"stop"}
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    status, answer = post(obedient, CHAT, response_format=AS_FORMAT, max_tokens=5)
    assert status == 200 and answer["choices"][0]["finish_reason"] == "length"


def test_the_client_parses_its_own_models(obedient) -> None:
    class Person(BaseModel):
        name: str
        tall: bool | None = None

    with obedient.client() as client:
        found = client.chat.completions.parse(model="", messages=[{"role": "user", "content": "hi"}], response_format=Person)
        assert isinstance(found.choices[0].message.parsed, Person)
        response = client.responses.parse(model="", input="hi", text_format=Person)
        assert isinstance(response.output_parsed, Person)


WEATHER = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
CITY = {**SCHEMA, "properties": {"which": {"type": "string", "maxLength": 9}, **SCHEMA["properties"]}, "required": ["which"]}
AS_CITY = {"type": "json_schema", "name": "city", "schema": CITY}
TOOLS: dict[str, dict[str, Any]] = {
    CHAT: {"tools": [{"type": "function", "function": {"name": "f", "parameters": WEATHER, "strict": True}}],
           "response_format": {"type": "json_schema", "json_schema": AS_CITY}, "max_tokens": 500},
    RESPONSES: {"tools": [{"type": "function", "name": "f", "parameters": WEATHER}], "max_output_tokens": 500,
                "text": {"format": AS_CITY}},
    MESSAGES: {"tools": [{"name": "f", "input_schema": WEATHER}], "max_tokens": 500,
               "output_config": {"format": {"type": "json_schema", "schema": CITY}}},
}  # fmt: skip


def called(path: str, answer: dict[str, Any]) -> list[tuple[str, Any]]:
    """Name and arguments of the calls in an answer."""
    if path == CHAT:
        calls = [call["function"] for call in answer["choices"][0]["message"].get("tool_calls") or []]
    else:
        items = answer["output" if path == RESPONSES else "content"]
        calls = [item for item in items if item["type"] in ("function_call", "tool_use")]
    return [(call["name"], call["input"] if path == MESSAGES else json.loads(call["arguments"])) for call in calls]


@pytest.mark.parametrize("path", TOOLS)
@pytest.mark.parametrize("parser", ["hermes", "mistral", "llama3", "pythonic"])
def test_a_form_beside_tools(fresh_server, parser, path) -> None:
    """Calls that fit, or an answer of the form; and what tool_choice makes of it."""
    special = {"hermes": (), "mistral": ("[TOOL_CALLS]", "[ARGS]"), "llama3": ("<|python_tag|>",), "pythonic": ()}[parser]
    shown = "{% if tools %}{{ tools }}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    server = fresh_server(special=special, template=shown, info=fresh_server.ROOMY, tool_parser=parser)
    obey(server, vocabulary_of(server))
    kinds = set()
    for seed in range(16):
        status, answer = post(server, path, seed=seed, **TOOLS[path])
        assert status == 200, answer
        calls = called(path, answer)
        for name, given in calls:
            assert name == "f"
            jsonschema.validate(given, WEATHER)
        if not calls:
            jsonschema.validate(json.loads(text_of(path, answer)), CITY)
        kinds.add(bool(calls))
    assert kinds == {True, False}
    none, must = ({"type": "none"}, {"type": "any"}) if path == MESSAGES else ("none", "required")
    status, answer = post(server, path, **TOOLS[path], tool_choice=none)
    assert status == 200 and not called(path, answer)
    jsonschema.validate(json.loads(text_of(path, answer)), CITY)
    assert called(path, post(server, path, **TOOLS[path], tool_choice=must)[1])


def test_a_form_beside_tools_streamed(fresh_server) -> None:
    server = fresh_server(info=fresh_server.ROOMY)
    obey(server, vocabulary_of(server))
    for seed in range(6):
        status, whole = post(server, CHAT, seed=seed, **TOOLS[CHAT])
        choices = [event["choices"][0] for event in server.stream(seed=seed, **TOOLS[CHAT]) if event != "[DONE]"]
        content = "".join(choice["delta"].get("content") or "" for choice in choices)
        given = "".join(call["function"].get("arguments", "") for choice in choices
                        for call in choice["delta"].get("tool_calls", []))  # fmt: skip
        message = whole["choices"][0]["message"]
        assert content == (message["content"] or "")
        assert given == "".join(call["function"]["arguments"] for call in message.get("tool_calls") or [])


@pytest.mark.parametrize("fields", [
    {"response_format": {"type": "text"}}, {"response_format": None}, {"structured_outputs": {}}, {"structured_outputs": None},
    {"structured_outputs": {"json": None}},
])  # fmt: skip
def test_no_form_at_all(server, fields) -> None:
    status, _ = post(server, CHAT, **fields)
    assert status == 200 and server.fake.requests[-1].params.grammar is None


def test_an_output_config_without_a_format(server) -> None:
    for config in ({}, None, {"format": None}, {"effort": None}, {"effort": "max"}):
        assert post(server, MESSAGES, output_config=config)[0] == 200
        assert server.fake.requests[-1].params.grammar is None


BAD = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
DEEP = "at '#/properties/a/uniqueItems'"


@pytest.mark.parametrize(("path", "fields", "code", "param", "words"), [
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": BAD}}}, "invalid_json_schema",
     "response_format.json_schema.schema", DEEP),
    (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "a", "schema": BAD}}}, "invalid_json_schema",
     "text.format.schema", DEEP),
    (MESSAGES, {"structured_outputs": {"json": BAD}}, None, None, DEEP),
    (MESSAGES, {"output_config": {"format": {"type": "json_schema", "schema": BAD}}}, None, None, DEEP),
    (MESSAGES, {"output_config": {"format": {"type": "json_schema"}}}, None, None, "'output_config.format.schema'"),
    (MESSAGES, {"output_config": {"format": {"type": "text", "schema": {}}}}, None, None, "'json_schema'"),
    (MESSAGES, {"output_config": {"task_budget": {}}}, None, None, "'output_config.task_budget' is not supported"),
    (MESSAGES, {"output_config": {"task_budget": {}}}, None, None, "use max_tokens"),
    (MESSAGES, {"output_config": {"x": 1}}, None, None, "'output_config.x'"),
    (MESSAGES, {"output_config": []}, None, None, "'output_config'"),
    (MESSAGES, {"output_format": {"type": "json_schema", "schema": {}}}, None, None, "output_config.format"),
    (MESSAGES, {"output_config": {"format": {"type": "json_schema", "schema": {}}}, "structured_outputs": {"regex": "a"}}, None,
     None, "not both"),
    (CHAT, {"structured_outputs": {"json": "{"}}, "invalid_value", "structured_outputs.json", "JSON"),
    (CHAT, {"structured_outputs": {"json": 3}}, "invalid_type", "structured_outputs.json", "JSON"),
    (CHAT, {"structured_outputs": {"choice": []}}, "empty_array", "structured_outputs.choice", ""),
    (CHAT, {"structured_outputs": {"choice": [""]}}, "invalid_grammar", "structured_outputs.choice", "empty"),
    (CHAT, {"structured_outputs": {"regex": ""}}, "invalid_grammar", "structured_outputs.regex", "empty"),
    (CHAT, {"structured_outputs": {"structural_tag": "x"}}, "unsupported_parameter", "structured_outputs.structural_tag", ""),
    (CHAT, {"structured_outputs": {"regex": "a"}, "response_format": AS_FORMAT}, "invalid_value", "response_format", "either"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "missing_required_parameter",
     "response_format.json_schema.name", ""),
    (CHAT, {"guided_json": SCHEMA}, "unsupported_parameter", "guided_json", "structured_outputs"),
    (CHAT, {"structured_outputs": {"grammar": 'root ::= "a"'}, "tools": [{"type": "function", "function": {"name": "f"}}]},
     "unsupported_parameter", "structured_outputs.grammar", "tool_choice"),
])  # fmt: skip
def test_what_is_refused(server, path, fields, code, param, words) -> None:
    status, answer = post(server, path, **fields)
    error = answer["error"]
    assert status == 400 and words in error["message"], answer
    if path != MESSAGES:
        assert (error["code"], error["param"]) == (code, param)


def test_an_answer_that_cannot_go_on_is_the_requests_fault(server) -> None:
    async def stuck(request: Request):
        yield [TokenEvent(request.request_id, [65])]
        yield [TokenEvent(request.request_id, [], "error", error=UNANSWERABLE + "its grammar allows no token here")]

    inner, server.fake.generate = server.fake.generate, stuck
    try:
        status, answer = post(server, CHAT, structured_outputs={"regex": "A"})
    finally:
        server.fake.generate = inner
    assert status == 400 and answer["error"]["code"] == "no_token_allowed" and "no token" in answer["error"]["message"]
