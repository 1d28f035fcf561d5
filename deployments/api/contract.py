"""What this API takes and answers, said by the models that parse and describe it: /v1/capabilities, /openapi.json and a page
for people."""

from __future__ import annotations

import html
from functools import cache
from typing import Any, NamedTuple

from pydantic import BaseModel, TypeAdapter

from deployments.protocol.answers import completions, messages, responses, server
from deployments.protocol.anthropic_request import AnthropicRequest
from deployments.protocol.fields import BY_NAME, Endpoint
from deployments.protocol.requests import ChatRequest, CompletionRequest
from deployments.protocol.response_request import ResponseRequest
from deployments.protocol.tokens import DetokenizeRequest, TokenizeRequest

_WORDS = {"served": "supported", "ignored": "ignored", "refused": "refused"}
_PREFIX = "#/components/schemas/"


class Post(NamedTuple):
    """A route that takes a body. answer, event: the type of a whole answer, and of the events of a streamed one."""

    body: type[BaseModel]
    table: Endpoint
    summary: str
    answer: Any
    event: Any = None


class Get(NamedTuple):
    """A route that only tells. answer: the type of a JSON object, or another media type."""

    summary: str
    answer: Any


_POSTS: dict[str, Post] = {
    "/v1/chat/completions": Post(
        ChatRequest, "chat", "Answer a conversation; streamed as server-sent events if `stream` is true.",
        completions.ChatCompletion, completions.ChatEvent),
    "/v1/completions": Post(
        CompletionRequest, "completions", "Continue texts or token ids; streamed as server-sent events if `stream` is true.",
        completions.Completion, completions.CompletionEvent),
    "/v1/responses": Post(
        ResponseRequest, "responses", "Answer a conversation, in the form of OpenAI's Responses API; nothing is stored.",
        responses.ResponseObject, responses.AnyResponseEvent),
    "/v1/messages": Post(
        AnthropicRequest, "messages", "Answer a conversation, in the form of Anthropic's Messages API; "
                                      "/v1/messages/count_tokens takes the same and counts the prompt.",
        messages.AnthropicMessageAnswer, messages.AnyMessageEvent),
    "/tokenize": Post(TokenizeRequest, "tokenize", "The token ids of a text or a conversation.", server.Tokens),
    "/detokenize": Post(DetokenizeRequest, "detokenize", "The text of token ids.", server.Text),
}  # fmt: skip
_COUNT = "/v1/messages/count_tokens"
_GETS = {
    "/": Get("What is served; for browsers a page to chat with the model.", server.Index),
    "/v1/models": Get("The served model.", server.ModelList),
    "/v1/models/{id}": Get("The same, by its name.", server.ModelCard),
    "/v1/capabilities": Get("Every request field, and what this server does with it.", server.Capabilities),
    "/tokenizer_info": Get("Begin and end tokens and the chat template.", server.TokenizerInfo),
    "/health": Get("The process is alive.", server.State),
    "/ready": Get("Requests would be answered; 503 while weights load and while draining.", server.State),
    "/metrics": Get("Prometheus text.", "text/plain"),
    "/version": Get("Version of the server.", server.Version),
    "/openapi.json": Get("This API, for tools.", dict[str, Any]),
    "/load": Get("Sequences in work or waiting.", server.Load),
    "/docs": Get("This API, for people.", "text/html"),
    "/debug/dispatch": Get("Which kernel computes what, and why.", server.DispatchTable),
}
_TIMEOUT = {
    "name": "x-request-timeout", "in": "header", "schema": {"type": "number", "exclusiveMinimum": 0},
    "description": "Seconds this request may take, at most those of the server's setting.",
}  # fmt: skip
_MODEL_ID = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}


def capabilities() -> dict[str, Any]:
    """Each field of each endpoint as supported, refused or ignored."""
    found: dict[str, list[dict[str, str]]] = {}
    for path, post in _POSTS.items():  # a test keeps table and models in step
        fields = BY_NAME[post.table].values()
        found[path] = [{"name": one.name, "status": _WORDS[one.status], "note": one.note} for one in fields]
    found[_COUNT] = found["/v1/messages"]
    return {"object": "capabilities", "endpoints": found}


@cache
def openapi(version: str) -> dict[str, Any]:
    """An OpenAPI 3.1 document. Bodies have the schemas that validate them; fields of other servers may be sent, too. Answers
    have those of protocol/answers, which tests hold real ones against."""
    schemas = _bodies()
    answers, named = _answers()
    assert not schemas.keys() & named.keys(), f"schemas of the same name: {schemas.keys() & named.keys()}"
    paths: dict[str, Any] = {}
    for path, post in _POSTS.items():
        paths[path] = {"post": _operation(path, post, {"$ref": _PREFIX + post.body.__name__}, answers)}
    counted = {**AnthropicRequest.model_json_schema(ref_template=_PREFIX + "{model}"), "required": ["model", "messages"]}
    del counted["$defs"]  # they are there already; required: not what only an answer needs
    _as_parsed(counted)
    count = Post(AnthropicRequest, "messages", "The tokens of a prompt of /v1/messages.", messages.TokenCount)
    paths[_COUNT] = {"post": _operation(_COUNT, count, counted, answers)}
    for path, get in _GETS.items():
        found = answers.get(path, {"type": "string"})
        kind = "application/json" if path in answers else get.answer
        said = {"200": {"description": "The answer", "content": {kind: {"schema": found}}}, "default": _failure(path, answers)}
        if path == "/":
            said["200"]["content"]["text/html"] = {"schema": {"type": "string"}}  # type: ignore[index]
        if path == "/ready":
            said["503"] = {"description": "Not ready", "content": _json(found)}
        parameters = [_MODEL_ID] if "{id}" in path else []
        paths[path] = {"get": {"summary": get.summary, "parameters": parameters, "responses": said}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Mini-LLM-Infra", "version": version},
        "paths": paths,
        "components": {"schemas": {**schemas, **named}},
    }


def _bodies() -> dict[str, Any]:
    """Schemas of all request bodies, by name."""
    schemas: dict[str, Any] = {}
    for post in _POSTS.values():
        schema = post.body.model_json_schema(ref_template=_PREFIX + "{model}")
        schemas |= schema.pop("$defs", {})
        schemas[post.body.__name__] = schema
    for schema in schemas.values():
        _as_parsed(schema)
    return schemas


def _answers() -> tuple[dict[str, Any], dict[str, Any]]:
    """Schemas of answers by path, of events by path and " events", of errors by "error"; and those that they refer to."""
    kinds = {path: post.answer for path, post in _POSTS.items()}
    kinds |= {f"{path} events": post.event for path, post in _POSTS.items() if post.event is not None}
    kinds |= {path: get.answer for path, get in _GETS.items() if not isinstance(get.answer, str)}
    kinds |= {_COUNT: messages.TokenCount, "error": completions.ErrorAnswer, "anthropic error": messages.AnthropicError}
    inputs = [(name, "serialization", TypeAdapter(kind)) for name, kind in kinds.items()]
    found, named = TypeAdapter.json_schemas(inputs, ref_template=_PREFIX + "{model}")  # type: ignore[arg-type]
    return {name: schema for (name, _), schema in found.items()}, named["$defs"]


def _operation(path: str, post: Post, body: dict[str, Any], answers: dict[str, Any]) -> dict[str, Any]:
    content = _json(answers[path])
    if (event := answers.get(f"{path} events")) is not None:
        events = {"type": "array", "items": event}
        schema = {"type": "string", "contentMediaType": "text/event-stream", "contentSchema": events}
        content["text/event-stream"] = {"schema": schema}
    return {
        "summary": post.summary,
        "parameters": [] if post.event is None else [_TIMEOUT],
        "requestBody": {"required": True, "content": _json(body)},
        "responses": {"200": {"description": "The answer", "content": content}, "default": _failure(path, answers)},
    }


def page(version: str) -> str:
    """The same as HTML, without scripts or anything from elsewhere."""
    parts = [f"<!doctype html><meta charset=utf-8><title>Mini-LLM-Infra API</title><style>{_STYLE}</style>",
             f"<h1>Mini-LLM-Infra {html.escape(version)}</h1>"]  # fmt: skip
    fields = capabilities()["endpoints"]
    for path, post in _POSTS.items():
        rows = "".join(f"<tr class={one['status']}><td><code>{html.escape(one['name'])}</code><td>{one['status']}"
                       f"<td>{html.escape(one['note'])}" for one in fields[path])  # fmt: skip
        parts.append(f"<h2><code>POST {path}</code></h2><p>{html.escape(post.summary)}<table>{rows}</table>")
    for path, get in _GETS.items():
        parts.append(f"<h2><code>GET {path}</code></h2><p>{html.escape(get.summary)}")
    return "".join(parts)


_STYLE = "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}td{padding-right:1em}.refused{color:#a33}"


def _as_parsed(schema: dict[str, Any]) -> None:
    """In place, what pydantic leaves out: null means the default, and bounds behind an own validator have their names."""
    for key, name in _BOUNDS.items():
        if key in schema and not isinstance(schema[key], dict):
            schema[name] = schema.pop(key)
    for value in list(schema.values()):
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                _as_parsed(part)
    required = schema.get("required", [])
    for name, field in schema.get("properties", {}).items():
        if name in required:
            continue
        if "const" in field or "enum" in field or "$ref" in field:
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}
        elif "anyOf" in field and {"type": "null"} not in field["anyOf"]:
            field["anyOf"] = [*field["anyOf"], {"type": "null"}]
        elif "anyOf" not in field and "type" in field:
            field["type"] = [field["type"], "null"]


_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def _failure(path: str, answers: dict[str, Any]) -> dict[str, Any]:
    whose, name = ("Anthropic's", "anthropic error") if path.startswith("/v1/messages") else ("OpenAI's", "error")
    return {"description": f"What is wrong, in {whose} envelope", "content": _json(answers[name])}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
