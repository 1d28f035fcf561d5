"""Whether an answer is well-formed: the contract of every endpoint, checked on what really came over the socket."""

from __future__ import annotations

import json
from typing import Any

import jsonschema

from benchmarks import forms
from benchmarks.ask import Ask
from benchmarks.exchange import Reply


class Malformed(AssertionError):
    """What is wrong with an answer."""


def judge(ask: Ask, reply: Reply) -> int:
    """How many outputs had the form that was asked for, to their end. Raises Malformed."""
    formed = 0
    try:
        assert reply.status in ask.statuses, f"status {reply.status}"
        assert reply.header("x-request-id"), "no x-request-id"
        if reply.status >= 400:
            _error(ask, reply)
        elif ask.form is not None:
            formed = _formed(ask, reply)
        elif ask.kind == "deadline" and ask.fields.get("stream"):
            _hasty(ask, reply)
        elif ask.fields.get("stream"):
            assert reply.header("content-type") == "text/event-stream; charset=utf-8", reply.header("content-type")
            _STREAMS.get(ask.path.rpartition("/")[2], _chunks)(ask, _events(reply.body))
        else:
            assert reply.header("content-type") == "application/json", reply.header("content-type")
            _BODIES[ask.path.rpartition("/")[2]](ask, json.loads(reply.body))
    except (AssertionError, ValueError, KeyError, IndexError, TypeError, jsonschema.ValidationError) as error:
        raise Malformed(f"{type(error).__name__}: {error}; answer {reply.status} {reply.body[:2000]!r}") from error
    return formed


def _error(ask: Ask, reply: Reply) -> None:
    body = json.loads(reply.body)
    error = body["error"]
    assert isinstance(error["message"], str) and error["message"] and isinstance(error["type"], str)
    if ask.path.startswith("/v1/messages"):
        assert body.keys() == {"type", "error", "request_id"} and body["type"] == "error"
    else:
        assert body.keys() == {"error"} and error.keys() == {"message", "type", "param", "code"}
        assert isinstance(error["code"], str | None) and isinstance(error["param"], str | None)
    assert (reply.header("retry-after") is not None) == (reply.status in (429, 503))
    assert (reply.header("allow") is not None) == (reply.status == 405)
    if reply.status == 429:
        assert error["type"] == "rate_limit_error" and int(reply.header("retry-after") or 0) >= 1
    if reply.status == 401:
        assert error["code"] == "invalid_api_key" and reply.header("www-authenticate") == "Bearer"
    if reply.status in (408, 504):
        assert error["type"] == "timeout" and reply.header("x-should-retry") == "false"


def _formed(ask: Ask, reply: Reply) -> int:
    assert ask.form is not None
    if ask.fields.get("stream"):
        found = forms.streamed(ask.path, _events(reply.body))
    else:
        found = forms.outputs(ask.path, json.loads(reply.body))
    assert len(found) == ask.fields.get("n", 1)
    for output in found:
        forms.check(ask.form, output)
    return sum(output.ended for output in found)


def _hasty(ask: Ask, reply: Reply) -> None:
    """Whole, or ended by the deadline's error event."""
    head, mark, rest = reply.body.rpartition(b'data: {"error":')
    if not mark:
        _chunks(ask, _events(reply.body))
        return
    told, done, _ = (mark + rest).decode().split("\n\n")
    error = json.loads(told[6:])["error"]
    assert done == "data: [DONE]" and error.keys() == {"message", "type", "param", "code"}
    assert error["code"] in ("deadline_exceeded", "request_timeout") and (not head or _events(head))


def _events(raw: bytes) -> list[Any]:
    """The data of each event, [DONE] as a string. No CR, no id: or retry:, comments alone in their block."""
    assert b"\r" not in raw and raw.endswith(b"\n\n"), "not whole events"
    found: list[Any] = []
    value: Any
    for block in raw.decode().split("\n\n")[:-1]:
        kind, _, data = block.rpartition("\n")
        if block.startswith(": "):
            assert "\n" not in block
        else:
            assert data.startswith("data: ") and "\n" not in kind, block
            value = "[DONE]" if data == "data: [DONE]" else json.loads(data[6:])
            assert not kind or kind == "event: " + value["type"], block
            assert "error" not in value or value["error"] is None, block
            found.append(value)
    return found


def _text(ask: Ask, text: str, finish: str, stop_reason: Any) -> None:
    """A choice's own text, its finish and its stop reason."""
    fields = ask.fields
    stops = fields.get("stop", fields.get("stop_sequences", []))
    stops = [stops] if isinstance(stops, str) else stops
    assert finish in ("stop", "length", "tool_calls"), finish
    if isinstance(stop_reason, str):
        assert finish == "stop" and stop_reason in stops
        if fields.get("include_stop_str_in_output"):
            assert text.endswith(stop_reason)
    elif stop_reason is not None:
        assert finish == "stop" and stop_reason in fields["stop_token_ids"]
    if not fields.get("min_tokens") and not fields.get("include_stop_str_in_output"):
        assert not any(stop in text for stop in stops), f"a stop string in {text!r}"


def _usage(ask: Ask, usage: dict[str, Any]) -> None:
    made, prompt = usage["completion_tokens"], usage["prompt_tokens"]
    most = ask.fields["max_tokens"]
    least = max(min(1, most), ask.fields.get("min_tokens") or 0)
    assert least * ask.sequences <= made <= most * ask.sequences, usage
    assert prompt > 0 and usage["total_tokens"] == prompt + made
    assert 0 <= usage["prompt_tokens_details"]["cached_tokens"] <= prompt


def _logprobs(ask: Ask, logprobs: dict[str, Any], is_chat: bool) -> None:
    if not is_chat:
        lengths = {len(logprobs[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
        first, *others = logprobs["token_logprobs"] or [0.0]
        assert len(lengths) == 1 and all(value <= 0 for value in others)
        assert first is None if ask.fields.get("echo") else first <= 0
        return
    for entry in logprobs["content"]:
        assert entry["logprob"] <= 0 and len(entry["top_logprobs"]) == ask.fields.get("top_logprobs", 0)


def _whole(ask: Ask, body: dict[str, Any]) -> None:
    is_chat = "chat" in ask.path
    assert body["object"] == ("chat.completion" if is_chat else "text_completion") and body["created"] > 1.7e9
    assert ("timings" in body) == ask.fields.get("timings", False)
    assert [choice["index"] for choice in body["choices"]] == list(range(ask.sequences))
    for choice in body["choices"]:
        text = (choice["message"]["content"] or "") if is_chat else choice["text"]
        if not ask.fields.get("echo"):
            _text(ask, text, choice["finish_reason"], choice["stop_reason"])
        asked = ask.fields.get("logprobs")
        assert (choice["logprobs"] is not None) == (bool(asked) if is_chat else asked is not None)
        if choice["logprobs"] is not None:
            _logprobs(ask, choice["logprobs"], is_chat)
        assert ("token_ids" in choice) == ask.fields.get("return_token_ids", False)
        assert ("prompt_logprobs" in (body if is_chat else choice)) == ("prompt_logprobs" in ask.fields)
    _usage(ask, body["usage"])


def _chunks(ask: Ask, events: list[Any]) -> None:
    is_chat = "chat" in ask.path
    *chunks, done = events
    assert done == "[DONE]" and "[DONE]" not in chunks
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    wants_usage = ask.fields.get("stream_options", {}).get("include_usage", False)
    if wants_usage or ask.fields.get("timings"):
        last = chunks.pop()
        assert last["choices"] == [] and ("timings" in last) == ask.fields.get("timings", False)
        if wants_usage:
            _usage(ask, last["usage"])
    assert all(("usage" in chunk) == wants_usage and len(chunk["choices"]) == 1 for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert {choice["index"] for choice in choices} == set(range(ask.sequences))
    for index in range(ask.sequences):
        own = [choice for choice in choices if choice["index"] == index]
        assert [choice["finish_reason"] is not None for choice in own] == [False] * (len(own) - 1) + [True]
        if is_chat:
            assert ["role" in choice["delta"] for choice in own] == [True] + [False] * (len(own) - 1)
        text = "".join((choice["delta"].get("content") or "") if is_chat else choice["text"] for choice in own)
        if not ask.fields.get("echo"):
            _text(ask, text, own[-1]["finish_reason"], own[-1]["stop_reason"])
        parts = [choice["logprobs"] for choice in own if choice["logprobs"] is not None]
        if is_chat:
            for part in parts:
                _logprobs(ask, part, is_chat)
        elif parts:
            _logprobs(ask, {key: sum((part[key] for part in parts), []) for key in parts[0]}, is_chat)


def _response(ask: Ask, body: dict[str, Any]) -> str:
    """Its text."""
    assert body["object"] == "response" and body["status"] in ("completed", "incomplete") and body["error"] is None
    assert (body["incomplete_details"] is not None) == (body["status"] == "incomplete")
    usage = body["usage"]
    assert 0 < usage["output_tokens"] <= ask.fields["max_output_tokens"] and usage["input_tokens"] > 0
    [item] = body["output"]
    [part] = item["content"]
    assert part["type"] == "output_text"
    return part["text"]


def _response_events(ask: Ask, events: list[Any]) -> None:
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    begin = ["created", "in_progress", "output_item.added", "content_part.added"]
    deltas = kinds.count("output_text.delta")
    end = ["output_text.done", "content_part.done", "output_item.done"]
    assert kinds[:-1] == begin + ["output_text.delta"] * deltas + end, kinds
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert _response(ask, events[-1]["response"]) == text == events[len(begin) + deltas]["text"]


def _message(ask: Ask, body: dict[str, Any]) -> None:
    assert body["type"] == "message" and body["role"] == "assistant"
    assert 0 < body["usage"]["output_tokens"] <= ask.fields["max_tokens"]
    [block] = body["content"]
    _stop(ask, body, block["text"])


def _message_events(ask: Ask, events: list[Any]) -> None:
    kinds = [event["type"] for event in events]
    deltas = kinds.count("content_block_delta")
    begin, end = ["message_start", "content_block_start"], ["content_block_stop", "message_delta", "message_stop"]
    assert kinds == begin + ["content_block_delta"] * deltas + end, kinds
    text = "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta")
    _stop(ask, events[-2]["delta"], text)


def _stop(ask: Ask, message: dict[str, Any], text: str) -> None:
    reason, sequence = message["stop_reason"], message["stop_sequence"]
    assert reason in ("end_turn", "max_tokens", "stop_sequence") and (sequence is not None) == (reason == "stop_sequence")
    _text(ask, text, "length" if reason == "max_tokens" else "stop", sequence)


def _tokens(ask: Ask, body: dict[str, Any]) -> None:
    assert body["count"] == len(body["tokens"]) > 0 and body["max_model_len"] > 0
    if ask.fields.get("return_token_strs"):
        assert len(body["token_strs"]) == body["count"]


def _prompt(ask: Ask, body: dict[str, Any]) -> None:
    assert body.keys() == {"prompt"} and isinstance(body["prompt"], str)


_BODIES = {"completions": _whole, "responses": _response, "messages": _message, "tokenize": _tokens, "detokenize": _prompt}
_STREAMS = {"responses": _response_events, "messages": _message_events}
