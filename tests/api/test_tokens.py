"""/tokenize, /detokenize, /tokenizer_info; what the server says of itself: capabilities, OpenAPI, the page; aliases."""

import json
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from deployments.api.contract import capabilities, openapi
from deployments.protocol.fields import BY_NAME
from deployments.protocol.requests import ChatRequest, CompletionRequest

MESSAGES = [{"role": "user", "content": "Hello world!"}]


def post(server, path, body):
    status, headers, data = server.raw("POST", path, body)
    return status, headers, json.loads(data)


def test_a_text_is_tokenised_and_comes_back(server):
    status, _, found = post(server, "/tokenize", {"prompt": "Hello world! abz", "return_token_strs": True})
    assert status == 200 and found["tokens"] == server.encode("Hello world! abz")
    assert found["count"] == len(found["tokens"]) and found["max_model_len"] == 256
    assert "".join(found["token_strs"]) == "Hello world! abz"
    status, _, back = post(server, "/detokenize", {"tokens": found["tokens"], "model": "acme/tiny"})
    assert (status, back) == (200, {"prompt": "Hello world! abz"})


def test_control_tokens_are_tokenised_as_such(server):
    text = "<|im_start|>user\nHello<|im_end|>"
    tokens = post(server, "/tokenize", {"prompt": text})[2]["tokens"]
    assert tokens == [server.IM_START, *server.encode("user\nHello"), server.IM_END]
    assert post(server, "/detokenize", {"tokens": tokens})[2]["prompt"] == text


def test_a_text_longer_than_the_context_is_counted(server):
    assert post(server, "/tokenize", {"prompt": "z" * 3000})[2] == {
        "count": 3000, "max_model_len": 256, "tokens": [122] * 3000, "token_strs": None}  # fmt: skip
    assert post(server, "/tokenize", {"prompt": ""})[2]["count"] == 0


def test_a_conversation_is_tokenised_as_the_chat_endpoint_does(server):
    found = post(server, "/tokenize", {"messages": MESSAGES})[2]["tokens"]
    server.client().chat.completions.create(model="acme/tiny", messages=MESSAGES)
    assert found == server.fake.requests[-1].prompt_ids and found[0] == server.IM_START
    shorter = post(server, "/tokenize", {"messages": MESSAGES, "add_generation_prompt": False})[2]["tokens"]
    assert found[: len(shorter)] == shorter and len(shorter) < len(found)
    assert post(server, "/detokenize", {"tokens": shorter})[2]["prompt"] == "<|im_start|>user\nHello world!<|im_end|>\n"


@settings(max_examples=30, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_survives_the_round_trip(_server, text):
    tokens = post(_server, "/tokenize", {"prompt": text})[2]["tokens"]
    assert post(_server, "/detokenize", {"tokens": tokens})[2]["prompt"] == text


@pytest.mark.parametrize(("path", "body", "status", "param"), [
    ("/tokenize", {}, 400, "prompt"),
    ("/tokenize", {"prompt": "a", "messages": MESSAGES}, 400, "prompt"),
    ("/tokenize", {"prompt": 3}, 400, "prompt"),
    ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
    ("/tokenize", {"messages": []}, 400, "messages"),
    ("/tokenize", {"messages": [{"role": "user"}]}, 400, "messages[0].content"),
    ("/tokenize", {"messages": MESSAGES, "chat_template_kwargs": {"tools": []}}, 400, "chat_template_kwargs"),
    ("/tokenize", {"messages": MESSAGES, "add_special_tokens": True}, 400, "add_special_tokens"),
    ("/tokenize", {"messages": MESSAGES, "chat_template": "x"}, 400, "chat_template"),
    ("/tokenize", {"messages": MESSAGES, "tools": [{"type": "function"}]}, 400, "tools[0].function"),
    ("/tokenize", {"messages": MESSAGES, "continue_final_message": True, "add_generation_prompt": True}, 400,
     "continue_final_message"),
    ("/tokenize", {"prompt": "a", "continue_final_message": True}, 400, "continue_final_message"),
    ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, 400, "add_generation_prompt"),
    ("/tokenize", {"prompt": "a", "chat_template_kwargs": {"x": 1}}, 400, "chat_template_kwargs"),
    ("/tokenize", {"prompt": "a", "tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
    ("/detokenize", {}, 400, "tokens"),
    ("/detokenize", {"tokens": [10**6]}, 400, "tokens"),
    ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
    ("/detokenize", {"tokens": ["a"]}, 400, "tokens[0]"),
    ("/detokenize", {"tokens": [1], "model": "other"}, 404, "model"),
])  # fmt: skip
def test_what_is_refused(server, path, body, status, param):
    found, _, answer = post(server, path, body)
    assert (found, answer["error"]["param"]) == (status, param), answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_the_tokenizer_says_what_it_is(server):
    status, _, data = server.raw("GET", "/tokenizer_info")
    found = json.loads(data)
    assert status == 200 and found["eos_token"] == "<|im_end|>" and found["bos_token"] is None
    assert "im_start" in found["chat_template"] and found["model_max_length"] == 256


def test_base_urls_without_v1(server):
    assert post(server, "/chat/completions", {"messages": MESSAGES})[2]["object"] == "chat.completion"
    assert post(server, "/completions", {"prompt": "a"})[2]["object"] == "text_completion"
    assert json.loads(server.raw("GET", "/models")[2])["data"][0]["id"] == "acme/tiny"
    assert json.loads(server.raw("GET", "/models/acme/tiny")[2])["id"] == "acme/tiny"
    assert server.raw("GET", "/models/acme/huge")[0] == 404


def test_capabilities_name_every_field_once(server):
    found = json.loads(server.raw("GET", "/v1/capabilities")[2])
    assert found == json.loads(json.dumps(capabilities()))
    paths = openapi("")["paths"]
    assert found["endpoints"].keys() == {path for path in paths if "post" in paths[path]}
    for path, name in (("/v1/chat/completions", "chat"), ("/v1/completions", "completions")):
        said = {one["name"]: one["status"] for one in found["endpoints"][path]}
        assert said.keys() == BY_NAME[name].keys() and len(said) == len(found["endpoints"][path])
        assert set(said.values()) == {"supported", "ignored", "refused"}


def test_a_last_message_that_is_continued_is_tokenised_so(server):
    messages = [*MESSAGES, {"role": "assistant", "content": "zyx"}]
    tokens = post(server, "/tokenize", {"messages": messages, "continue_final_message": True})[2]["tokens"]
    assert bytes(tokens[-3:]) == b"zyx"
    status, _, answer = post(server, "/tokenize", {"messages": MESSAGES, "continue_final_message": True})
    assert (status, answer["error"]["param"]) == (400, "continue_final_message")


CHATTY = (
    "{{ mood }}{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}{{ m.content }}|{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


def test_whatever_renders_a_chat_renders_what_is_tokenised(fresh_server):
    """Every field that says how messages are rendered says the same here and in chat, and changes what is rendered."""
    server = fresh_server(template=CHATTY)
    messages = [*MESSAGES, {"role": "assistant", "content": "zyx"}]
    for generation, more, mood, tools in product((None, True, False), (True, False), (None, "sad"), (0, 2)):
        functions = [{"type": "function", "function": {"name": f"f{i}"}} for i in range(tools)]
        body = {"messages": messages, "add_generation_prompt": generation, "continue_final_message": more, "tools": functions,
                "chat_template_kwargs": {} if mood is None else {"mood": mood}}  # fmt: skip
        status, _, found = post(server, "/tokenize", body)
        if generation and more:
            assert status == 400
            continue
        expected = (mood or "") + "".join(f"[f{i}]" for i in range(tools)) + "Hello world!|zyx" + ("" if more else "|")
        expected += ">" if generation or (generation is None and not more) else ""
        assert post(server, "/detokenize", {"tokens": found["tokens"]})[2]["prompt"] == expected
        assert post(server, "/v1/chat/completions", body)[0] == 200
        assert server.fake.requests[-1].prompt_ids == found["tokens"]


def test_load(server):
    assert json.loads(server.raw("GET", "/load")[2]) == {"server_load": 0}
    with server.gate.hold(3):
        assert json.loads(server.raw("GET", "/load")[2]) == {"server_load": 3}


def test_a_field_that_capabilities_call_refused_is_refused(server):
    for path, extra in (("/v1/chat/completions", {"messages": MESSAGES}), ("/v1/completions", {"prompt": "a"})):
        for field in capabilities()["endpoints"][path]:
            if field["status"] == "refused":
                status, _, answer = post(server, path, {**extra, field["name"]: {"surely": "not harmless"}})
                assert (status, answer["error"]["param"]) == (400, field["name"])


def test_the_document_is_about_the_routes_that_exist(server):
    document = json.loads(server.raw("GET", "/openapi.json")[2])
    assert document == json.loads(json.dumps(openapi(document["info"]["version"])))
    routes = {route.path.replace(":path", ""): route.methods for route in server.app.routes}
    for path, operations in document["paths"].items():
        assert {method.upper() for method in operations} <= routes[path]
    schemas = document["components"]["schemas"]
    assert schemas["ChatRequest"]["properties"].keys() == ChatRequest.model_fields.keys()
    assert schemas["CompletionRequest"]["properties"].keys() == CompletionRequest.model_fields.keys()
    text = json.dumps(document)
    named = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert named <= schemas.keys()


def test_the_page_needs_nothing_from_elsewhere(server):
    status, headers, data = server.raw("GET", "/docs")
    text = data.decode()
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert "http" not in text.replace("HTTP", "") and "<script" not in text and "response_format" in text


@pytest.mark.parametrize("name, body", [
    ("ChatRequest", {"messages": MESSAGES}),
    ("ChatRequest", {"messages": MESSAGES, "stop": "a", "n": None, "seed": 2**63 - 1, "max_tokens": 4.0, "stream": None}),
    ("ChatRequest", {"messages": MESSAGES, "stop": ["a", "b"], "logit_bias": {"5": 1}, "top_k": -1, "unknown": {}}),
    ("ChatRequest", {"prompt": "a", "temperature": None, "stop": None}),
    ("CompletionRequest", {"prompt": "a"}),
    ("CompletionRequest", {"prompt": ["a", "b"]}),
    ("CompletionRequest", {"prompt": [97, 98], "max_tokens": 0, "echo": True}),
    ("CompletionRequest", {"prompt": [[97], [98]], "logprobs": 1}),
])  # fmt: skip
def test_the_document_allows_what_is_taken(server, name, body):
    path = "/v1/chat/completions" if name == "ChatRequest" else "/v1/completions"
    assert post(server, path, body)[0] == 200
    assert _schema(name).is_valid(body)


@pytest.mark.parametrize("field", [
    {"stop": ""}, {"stop": [1]}, {"n": 0}, {"max_tokens": -1}, {"temperature": 3}, {"temperature": "1"}, {"seed": 2**63},
    {"stream": 1}, {"repetition_penalty": 0}, {"top_k": -2}, {"stop_token_ids": [-1]}, {"min_tokens": 1.5},
    {"logit_bias": {"5": 101}}, {"logit_bias": {"-5": 1}}, {"repetition_penalty": 0.001}, {"structured_outputs": {"lark": "a"}},
    {"logit_bias": dict.fromkeys(map(str, range(513)), 1)},
])  # fmt: skip
def test_what_the_document_forbids_is_refused(server, field):
    for name, path in (("ChatRequest", "/v1/chat/completions"), ("CompletionRequest", "/v1/completions")):
        assert not _schema(name).is_valid({"prompt": "a", **field})
        assert post(server, path, {"prompt": "a", **field})[0] == 400


def _schema(name):
    schemas = openapi("1")["components"]["schemas"]
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas}})
