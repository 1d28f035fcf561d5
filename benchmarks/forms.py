"""Requests whose answers have a form, structured output and calls of tools, and whether an answer has it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jsonschema

_DAY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"enum": [1, 2, 3]}},
        "required": ["city", "days"], "additionalProperties": False}  # fmt: skip
_FLAG = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"], "additionalProperties": False}
_LIST = {"type": "array", "items": {"enum": ["a", "bb", None]}, "minItems": 1, "maxItems": 4}
SCHEMAS: tuple[dict[str, Any], ...] = (_DAY, _FLAG, {"type": "object", "properties": {"list": _LIST, "day": {"anyOf": [_FLAG, {
    "type": "null"}]}}, "required": ["list", "day"], "additionalProperties": False})  # fmt: skip
REGEXES = (r"[a-c]{3,9}", r"(yes|no), [0-9]{1,3}( times)?", r"\d{4}-(0[1-9]|1[0-2])", "é+x")
CHOICES = (["yes", "no"], ["red", "red wine", "日本"], ["a"])
TOOLS = {"day": _DAY, "set": _FLAG}  # names → parameters


@dataclass(frozen=True)
class Form:
    """What an answer must be: a document of a schema, a match of an expression, one of some texts; or it may call tools (names
    → parameters), must do so, and then none but `named`."""

    schema: dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    tools: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    must_call: bool = False
    named: str | None = None


@dataclass
class Output:
    """One choice of an answer, of any endpoint. calls: names and arguments; ended: by itself, not at max_tokens."""

    text: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    ended: bool = False


# ---- requests ------------------------------------------------------------------------------------------------------


def structured(draw: random.Random) -> tuple[str, dict[str, Any], Form]:
    """Endpoint, the fields that ask for a form, and the form."""
    schema = draw.choice(SCHEMAS)
    named = {"name": "form", "schema": schema, "strict": draw.choice((True, False))}
    regex, choice = draw.choice(REGEXES), draw.choice(CHOICES)
    ways: list[tuple[str, dict[str, Any], Form]] = [
        ("/v1/chat/completions", {"response_format": {"type": "json_schema", "json_schema": named}}, Form(schema)),
        ("/v1/completions", {"response_format": {"type": "json_schema", "json_schema": named}}, Form(schema)),
        ("/v1/chat/completions", {"structured_outputs": {"json": schema}}, Form(schema)),
        ("/v1/chat/completions", {"structured_outputs": {"regex": regex}}, Form(regex=regex)),
        ("/v1/completions", {"structured_outputs": {"regex": regex}}, Form(regex=regex)),
        ("/v1/chat/completions", {"structured_outputs": {"choice": choice}}, Form(choice=choice)),
        ("/v1/responses", {"text": {"format": {"type": "json_schema", **named}}}, Form(schema)),
    ]  # fmt: skip
    return draw.choice(ways)


def tools(draw: random.Random) -> tuple[str, dict[str, Any], Form]:
    """The same for calls; one in three requests leaves it to the model."""
    some = {name: TOOLS[name] for name in draw.sample(sorted(TOOLS), draw.randint(1, 2))}
    path = draw.choice(("/v1/chat/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"))
    mode, name = draw.choice(("auto", "required", "named")), draw.choice(sorted(some))
    form = Form(tools=some, must_call=mode != "auto", named=name if mode == "named" else None)
    if path == "/v1/messages":
        choice: Any = {"auto": {"type": "auto"}, "required": {"type": "any"}, "named": {"type": "tool", "name": name}}[mode]
        return path, {"tools": [{"name": n, "input_schema": s} for n, s in some.items()], "tool_choice": choice}, form
    functions = [{"name": n, "parameters": s} for n, s in some.items()]
    if path == "/v1/responses":
        choice = {"type": "function", "name": name} if mode == "named" else mode
        return path, {"tools": [{"type": "function", **f} for f in functions], "tool_choice": choice}, form
    choice = {"type": "function", "function": {"name": name}} if mode == "named" else mode
    fields = {"tools": [{"type": "function", "function": f} for f in functions], "tool_choice": choice}
    return path, {**fields, "parallel_tool_calls": draw.choice((True, False))}, form


# ---- answers -------------------------------------------------------------------------------------------------------


def check(form: Form, output: Output) -> None:
    """Raises AssertionError, ValueError or jsonschema.ValidationError."""
    text, ended = output.text, output.ended
    if not form.tools:
        assert not output.calls
        if form.choice is not None:
            assert text in form.choice if ended else any(one.startswith(text) for one in form.choice), text
        elif form.regex is not None:
            assert not ended or re.fullmatch(form.regex, text), text
        elif ended:
            jsonschema.validate(json.loads(text), form.schema)
        return
    assert output.calls or not (form.must_call and ended), "no call"
    for place, (name, arguments) in enumerate(output.calls):
        assert name in form.tools and form.named in (None, name), name
        if form.must_call and (ended or place < len(output.calls) - 1):
            jsonschema.validate(json.loads(arguments), form.tools[name])


def outputs(path: str, body: Any) -> list[Output]:
    """Of a whole answer."""
    if path == "/v1/responses":
        return [_of_response(body)]
    if path == "/v1/messages":
        found = Output(ended=body["stop_reason"] != "max_tokens")
        for block in body["content"]:
            if block["type"] == "text":
                found.text += block["text"]
            else:
                found.calls.append((block["name"], json.dumps(block["input"])))
        return [found]
    return [_of_choice(choice) for choice in body["choices"]]


def _of_choice(choice: dict[str, Any]) -> Output:
    finish = choice["finish_reason"]
    assert finish in ("stop", "length", "tool_calls"), finish
    message = choice.get("message", {"content": choice.get("text")})
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or []]
    assert finish != "tool_calls" or calls
    return Output(message["content"] or "", calls, finish != "length")


def _of_response(body: dict[str, Any]) -> Output:
    found = Output(ended=body["status"] == "completed")
    for item in body["output"]:
        if item["type"] == "function_call":
            found.calls.append((item["name"], item["arguments"]))
        else:
            found.text += item["content"][0]["text"]
    return found


def streamed(path: str, events: list[Any]) -> list[Output]:
    """Of the events of a stream, all of them."""
    if path == "/v1/responses":
        last = _of_response(events[-1]["response"])
        parts = {kind: "".join(event["delta"] for event in events if event["type"] == f"response.{kind}.delta")
                 for kind in ("output_text", "function_call_arguments")}  # fmt: skip
        assert parts["output_text"] == last.text
        assert parts["function_call_arguments"] == "".join(arguments for _, arguments in last.calls)
        return [last]
    if path == "/v1/messages":
        return [_of_blocks(events)]
    assert events[-1] == "[DONE]"
    choices = [choice for event in events[:-1] for choice in event["choices"]]
    return [_of_deltas([choice for choice in choices if choice["index"] == index])
            for index in range(1 + max(choice["index"] for choice in choices))]  # fmt: skip


def _of_blocks(events: list[Any]) -> Output:
    assert events[-1]["type"] == "message_stop"
    found = Output(ended=events[-2]["delta"]["stop_reason"] != "max_tokens")
    for event in events:
        if event["type"] == "content_block_start" and event["content_block"]["type"] == "tool_use":
            found.calls.append((event["content_block"]["name"], ""))
        elif event["type"] == "content_block_delta" and event["delta"]["type"] == "text_delta":
            found.text += event["delta"]["text"]
        elif event["type"] == "content_block_delta":
            name, arguments = found.calls[-1]
            found.calls[-1] = (name, arguments + event["delta"]["partial_json"])
    return found


def _of_deltas(choices: list[dict[str, Any]]) -> Output:
    calls: dict[int, list[str]] = {}
    text = ""
    for choice in choices:
        delta = choice.get("delta", {"content": choice.get("text")})
        text += delta.get("content") or ""
        for call in delta.get("tool_calls") or []:
            if "id" in call:
                assert call["index"] == len(calls)
                calls[call["index"]] = [call["function"]["name"], ""]
            calls[call["index"]][1] += call["function"].get("arguments") or ""
    finish = choices[-1]["finish_reason"]
    assert finish in ("stop", "length", "tool_calls") and (finish != "tool_calls" or calls)
    return Output(text, [(name, arguments) for name, arguments in calls.values()], finish != "length")
