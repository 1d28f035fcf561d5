"""Broken requests: what is wrong with each, and how a server should answer."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from benchmarks.ask import TOOLS, Ask

# what it is called, the statuses that may answer it, and a change of a good one: (kind, path, fields, statuses)
Fault = tuple[str, tuple[int, ...], Callable[..., Ask]]


def faults(draw: random.Random, *, vocab_size: int, context: int, max_body: int) -> list[Fault]:
    """One of each kind. vocab_size, context: of the served model; max_body: the server's limit, bytes."""

    def field_of(**wrong: Any) -> Callable[..., Ask]:
        return lambda kind, path, fields, statuses: Ask.of(kind, path, {**fields, **wrong}, statuses)

    def raw(change: Callable[[bytes], bytes]) -> Callable[..., Ask]:
        def make(kind: str, path: str, fields: dict[str, Any], statuses: tuple[int, ...]) -> Ask:
            return Ask(kind, path, change(json.dumps(fields).encode()), statuses)

        return make

    def elsewhere(**where: Any) -> Callable[..., Ask]:
        def make(kind: str, path: str, fields: dict[str, Any], statuses: tuple[int, ...]) -> Ask:
            return Ask(kind, **{"path": path, "body": json.dumps(fields).encode(), "statuses": statuses, **where})

        return make

    bad = (400,)
    text = draw.choice(("é", "🙂", "word ")) * (8 * context)
    return [
        ("cut JSON", bad, raw(lambda body: body[: draw.randrange(1, len(body))])),
        ("noise", bad, raw(lambda body: draw.randbytes(draw.randint(1, 300)))),
        ("not UTF-8", bad, raw(lambda body: body[:-1] + b',"user":"\xff\xc0"}')),
        ("lone surrogate", bad, raw(lambda body: body[:-1] + b',"user":"\\ud800"}')),
        ("not an object", bad, raw(lambda body: b"[" + body + b"]")),
        ("number too large", bad, raw(lambda body: body[:-1] + b',"seed":1e400}')),
        ("NaN", bad, raw(lambda body: body[:-1] + b',"temperature":NaN}')),
        ("nested", bad, raw(lambda body: body[:-1] + b',"x":' + b"[" * 5000 + b"]" * 5000 + b"}")),
        ("opened", bad, raw(lambda body: b'{"x":' * 20000)),
        ("huge", (413,), raw(lambda body: body[:-1] + b" " * max_body + b"}")),
        ("wrong type", bad, field_of(temperature=draw.choice(("1", True, [], {})))),
        ("out of range", bad, field_of(top_p=draw.choice((-1, 1.5, 1e300)))),
        ("integer out of range", bad, field_of(seed=draw.choice((2**63, -(2**64), 10**30, 0.5)))),
        ("id out of vocabulary", bad, field_of(stop_token_ids=[draw.choice((vocab_size, 2**31, 2**70, -1))])),
        ("bias of no token", bad, field_of(logit_bias={draw.choice(("x", "-1", "9" * 40, "")): 1})),
        ("no such model", (404,), field_of(model=draw.choice(("gpt-4", "../..", "a" * 3000)))),
        ("too long", bad, lambda kind, path, fields, statuses: Ask.of(kind, "/v1/chat/completions", {
            "messages": [{"role": "user", "content": text}], "max_tokens": 1}, statuses)),
        ("image", bad, lambda kind, path, fields, statuses: Ask.of(kind, "/v1/chat/completions", {
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, statuses)),
        ("more room than there is", bad, lambda kind, path, fields, statuses: Ask.of(kind, "/v1/completions", {
            "prompt": "a", "max_tokens": draw.choice((context + 1, 2**62))}, statuses)),
        ("content type", (415,), elsewhere(content_type=draw.choice(("text/plain", "application/xml", "x")))),
        ("unknown path", (404,), elsewhere(path=draw.choice(("/v1/nothing", "/v1/chat/completions/", "/%00", "//")))),
        ("wrong method", (405,), elsewhere(method=draw.choice(("PUT", "DELETE", "PATCH")))),
        ("no body", (400, 415), elsewhere(body=b"")),
        ("bad deadline", bad, elsewhere(headers=(("x-request-timeout", draw.choice(("0", "-1", "nan", "soon"))),))),
        ("schema nobody can keep to", bad, lambda kind, path, fields, statuses: Ask.of(kind, "/v1/chat/completions", {
            "messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_schema", "json_schema": {
                "name": "x", "schema": draw.choice(({"type": "x"}, {"not": {}}, {"$ref": "#/none"}))}}}, statuses)),
        ("tool that is not there", bad, lambda kind, path, fields, statuses: Ask.of(kind, "/v1/chat/completions", {
            "messages": [{"role": "user", "content": "a"}], "tools": TOOLS, "tool_choice": {
                "type": "function", "function": {"name": "nobody"}}}, statuses)),
    ]  # fmt: skip
