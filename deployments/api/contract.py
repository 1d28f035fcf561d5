"""What this API takes, said by the models that parse it: /v1/capabilities, /openapi.json and a page for people."""

from __future__ import annotations

import html
from typing import Any

from pydantic import BaseModel

from deployments.protocol.anthropic_request import AnthropicRequest
from deployments.protocol.fields import BY_NAME, Endpoint
from deployments.protocol.requests import ChatRequest, CompletionRequest
from deployments.protocol.response_request import ResponseRequest
from deployments.protocol.tokens import DetokenizeRequest, TokenizeRequest

_WORDS = {"served": "supported", "ignored": "ignored", "refused": "refused"}
_POSTS: dict[str, tuple[type[BaseModel], str]] = {
    "/v1/chat/completions": (ChatRequest, "Answer a conversation; streamed as server-sent events if `stream` is true."),
    "/v1/completions": (CompletionRequest, "Continue texts or token ids; streamed as server-sent events if `stream` is true."),
    "/v1/responses": (ResponseRequest, "Answer a conversation, in the form of OpenAI's Responses API; nothing is stored."),
    "/v1/messages": (AnthropicRequest, "Answer a conversation, in the form of Anthropic's Messages API; "
                                       "/v1/messages/count_tokens takes the same and counts the prompt."),
    "/tokenize": (TokenizeRequest, "The token ids of a text or a conversation."),
    "/detokenize": (DetokenizeRequest, "The text of token ids."),
}  # fmt: skip
_TABLES: dict[str, Endpoint] = {"/v1/chat/completions": "chat", "/v1/completions": "completions",
                                "/v1/responses": "responses", "/v1/messages": "messages",
                                "/tokenize": "tokenize", "/detokenize": "detokenize"}  # fmt: skip
_GETS = {
    "/v1/models": "The served model.", "/v1/capabilities": "Every request field, and what this server does with it.",
    "/tokenizer_info": "Begin and end tokens and the chat template.", "/health": "The process is alive.",
    "/ready": "Requests would be answered; 503 while weights load and while draining.",
    "/metrics": "Prometheus text.", "/version": "Version of the server.", "/openapi.json": "This API, for tools.",
    "/load": "Sequences in work or waiting.",
    "/docs": "This API, for people.", "/debug/dispatch": "Which kernel computes what, and why.",
}  # fmt: skip
_PARAMETERS = [
    {"name": "x-request-timeout", "in": "header", "schema": {"type": "number", "exclusiveMinimum": 0},
     "description": "Seconds this request may take, at most those of the server's setting."},
]  # fmt: skip
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {
        "type": "object",
        "required": ["message", "type", "param", "code"],
        "properties": {"message": {"type": "string"}, "type": {"type": "string"},
                       "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]}},
    }},
}  # fmt: skip
_ANTHROPIC_ERROR = {
    "type": "object",
    "required": ["type", "error", "request_id"],
    "properties": {"type": {"const": "error"}, "request_id": {"type": "string"}, "error": {
        "type": "object", "required": ["type", "message"],
        "properties": {"type": {"type": "string"}, "message": {"type": "string"}}}},
}  # fmt: skip


def capabilities() -> dict[str, Any]:
    """Each field of each endpoint as supported, refused or ignored."""
    found: dict[str, list[dict[str, str]]] = {}
    for path, endpoint in _TABLES.items():  # a test keeps table and models in step
        fields = BY_NAME[endpoint].values()
        found[path] = [{"name": one.name, "status": _WORDS[one.status], "note": one.note} for one in fields]
    return {"object": "capabilities", "endpoints": found}


def openapi(version: str) -> dict[str, Any]:
    """An OpenAPI 3.1 document. Bodies have the schemas that validate them; fields of other servers may be sent, too."""
    schemas: dict[str, Any] = {"Error": _ERROR, "AnthropicError": _ANTHROPIC_ERROR}
    failure = _failure("Error", "OpenAI's")
    paths: dict[str, Any] = {}
    for path, (model, summary) in _POSTS.items():
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
        content = _json({"type": "object"})
        if "stream" in model.model_fields:
            content["text/event-stream"] = {"schema": {"type": "string"}}
        body = {"required": True, "content": _json({"$ref": f"#/components/schemas/{model.__name__}"})}
        parameters = _PARAMETERS if "stream" in model.model_fields else []
        paths[path] = {"post": {"summary": summary, "parameters": parameters, "requestBody": body, "responses": {
            "200": {"description": "The answer", "content": content},
            "default": _failure("AnthropicError", "Anthropic's") if path == "/v1/messages" else failure}}}  # fmt: skip
    for schema in schemas.values():
        _as_parsed(schema)
    for path, summary in _GETS.items():
        paths[path] = {"get": {"summary": summary, "responses": {"200": {"description": "The answer"}, "default": failure}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Mini-LLM-Infra", "version": version},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def page(version: str) -> str:
    """The same as HTML, without scripts or anything from elsewhere."""
    parts = [f"<!doctype html><meta charset=utf-8><title>Mini-LLM-Infra API</title><style>{_STYLE}</style>",
             f"<h1>Mini-LLM-Infra {html.escape(version)}</h1>"]  # fmt: skip
    fields = capabilities()["endpoints"]
    for path, (_, summary) in _POSTS.items():
        rows = "".join(f"<tr class={one['status']}><td><code>{html.escape(one['name'])}</code><td>{one['status']}"
                       f"<td>{html.escape(one['note'])}" for one in fields[path])  # fmt: skip
        parts.append(f"<h2><code>POST {path}</code></h2><p>{html.escape(summary)}<table>{rows}</table>")
    for path, summary in _GETS.items():
        parts.append(f"<h2><code>GET {path}</code></h2><p>{html.escape(summary)}")
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
        if name not in required and "type" in field and "anyOf" not in field:
            field["type"] = [field["type"], "null"]
        elif name not in required and "anyOf" in field and {"type": "null"} not in field["anyOf"]:
            field["anyOf"] = [*field["anyOf"], {"type": "null"}]


_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def _failure(schema: str, whose: str) -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{schema}"}
    return {"description": f"What is wrong, in {whose} envelope", "content": _json(reference)}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
