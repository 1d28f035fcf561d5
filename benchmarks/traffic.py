"""Random requests as a public server gets them: good ones of every endpoint, broken ones, and clients of every manner."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks import forms

SEQUENCES = 4  # at most so many in one request
FORM_ROOM = 8  # times the tokens of other answers: the longest form has 150 bytes, each a token without merges
MANNERS = ("read", "read", "read", "read", "slow", "leave", "leave", "reset")
TEXTS = (
    "The sea is wide", "Straße, naïve café", "日本語のテキスト", "مرحبا بالعالم", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "e\u0301 a\u0308 n\u0303",
    "🙂\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308", "\u2028\u2029\ufeff", "<|im_start|>system\n<|im_end|>",
    "</s><s>[INST]", "{{ 7 * 7 }}{% raw %}", "\x00\x01\x1f", "   \n\t ", "'\"\\ $(x) `y`",
)  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}}]  # fmt: skip


@dataclass(frozen=True)
class Ask:
    """One request. body: as sent; fields: what it asks for, if it is a good one. statuses: those that may answer it.

    manner: read (all of the answer), slow (all, in sips), leave (close after some bytes) or reset (the same by a TCP reset);
    patience: how many bytes until a client leaves, below 0: it does so with so many bytes of the request unsent. key: of the
    API; form: of the answer.
    """

    kind: str
    path: str
    body: bytes
    statuses: tuple[int, ...] = (200,)
    fields: dict[str, Any] = field(default_factory=dict)
    method: str = "POST"
    content_type: str = "application/json"
    manner: str = "read"
    patience: int = 0
    headers: tuple[tuple[str, str], ...] = ()
    key: str | None = None
    form: forms.Form | None = None

    @property
    def good(self) -> bool:
        return self.statuses == (200,)

    @property
    def sequences(self) -> int:
        prompts = self.fields.get("prompt")
        batch = len(prompts) if isinstance(prompts, list) and not isinstance(prompts[0], int) else 1
        return batch * self.fields.get("n", 1)

    def head(self) -> bytes:
        lines = [f"{self.method} {self.path} HTTP/1.1", "host: 127.0.0.1", "connection: close"]
        if self.body:
            lines += [f"content-type: {self.content_type}", f"content-length: {len(self.body)}"]
        if self.key is not None:
            lines.append(f"authorization: Bearer {self.key}")
        lines += [f"{name}: {value}" for name, value in self.headers]
        return "\r\n".join(lines).encode() + b"\r\n\r\n"


class Traffic:
    """The same seed makes the same requests. vocab_size, context: of the served model; max_body: the server's limit, bytes;
    keys: of a server that wants one, first one without limits, then some with."""

    def __init__(self, seed: int, *, model: str, vocab_size: int, context: int, max_body: int, max_tokens: int = 24,
                 keys: Sequence[str] = ()) -> None:  # fmt: skip
        self._random = random.Random(seed)
        self._model = model
        self._vocab_size = vocab_size
        self._context = context
        self._max_body = max_body
        self._max_tokens = max_tokens
        self.keys = keys
        self._good: list[Callable[[], tuple[str, dict[str, Any]]]] = [
            self._chat, self._chat, self._completion, self._completion, self._response, self._message, self._tokenize,
            self._detokenize,
        ]  # fmt: skip

    def next(self) -> Ask:
        """Two of three requests are good ones."""
        if self.keys and self._random.random() < 0.06:
            return self._keyed()
        if self._random.random() < 0.33:
            return self.with_key(self._bad())
        if self._random.random() < 0.25:
            ask = self._formed()
        elif self._random.random() < 0.05:
            ask = self._hasty()
        else:
            path, fields = self._random.choice(self._good)()
            ask = _ask(path.rpartition("/")[2], path, fields)
            ask = replace(ask, headers=self._random.choice(((), (), (), (("x-request-timeout", "100"),))))
        ask = self.with_key(replace(ask, manner=self._random.choice(MANNERS)))
        if ask.manner in ("leave", "reset"):
            patience = self._random.choice((-self._random.randint(1, len(ask.body)), 0, 1, self._random.randint(2, 4000)))
            return replace(ask, patience=patience)
        return ask

    def crowd(self, count: int, key: str) -> list[Ask]:
        """So many requests for a key that may have one at a time."""
        fields = {"prompt": "a", "max_tokens": 20, "ignore_eos": True}
        return [replace(_ask("crowd", "/v1/completions", fields, (200, 429)), key=key) for _ in range(count)]

    def burst(self, sequences: int, tokens: int) -> list[Ask]:
        """Chat requests of at least so many sequences together, each of which may be answered by a 503. tokens: of each
        answer, so many that the first have not ended when the last come."""
        asks: list[Ask] = []
        while sum(ask.sequences for ask in asks) < sequences:
            path, fields = self._chat()
            fields |= {"n": 2, "max_tokens": tokens, "min_tokens": 0, "ignore_eos": True, "stop": [], "stop_token_ids": []}
            asks.append(self.with_key(_ask("burst", path, fields, (200, 503))))
        return asks

    def _keyed(self) -> Ask:
        """By somebody who must not get in, or only so often."""
        fields = {"prompt": self._text(20), "max_tokens": self._random.randint(1, self._max_tokens)}
        key = self._random.choice((None, "sk-nobody", *self.keys[1:], *self.keys[1:]))
        known = key in self.keys
        ask = _ask("key with limits" if known else "no key", "/v1/completions", fields, (200, 429) if known else (401,))
        return replace(ask, key=key)

    def _formed(self) -> Ask:
        """An answer with a form, structured or calls. Other fields only as far as they leave it whole."""
        path, fields, form = self._random.choice((forms.structured, forms.tools))(self._random)
        fields |= {**self._maybe(0.6, "temperature", round(self._random.uniform(0, 1.5), 2)),
                   **self._maybe(0.5, "stream", True), **self._maybe(0.5, "seed", self._random.randint(0, 10**6))}  # fmt: skip
        if path == "/v1/completions":
            fields["prompt"] = self._text()
        else:
            fields["input" if path == "/v1/responses" else "messages"] = self._conversation()
        if path == "/v1/messages":
            fields |= {"model": self._model, "temperature": min(fields.get("temperature", 1), 1)}
        elif path != "/v1/responses":
            fields |= self._maybe(0.3, "n", 2)
        fields["max_output_tokens" if path == "/v1/responses" else "max_tokens"] = FORM_ROOM * self._max_tokens
        return replace(_ask("calls" if form.tools else "structured", path, fields), form=form)

    def _hasty(self) -> Ask:
        """With a deadline that passes before the end of the answer, or after it. Serve's header means the same."""
        path, fields = "/v1/completions", {"prompt": self._text(), "max_tokens": 400, "ignore_eos": True}
        fields |= {**self._maybe(0.5, "stream", True), **self._maybe(0.3, "n", 2)}
        name = self._random.choice(("x-request-timeout", "x-request-timeout-seconds"))
        headers = ((name, f"{self._random.uniform(0.001, 0.5):.3f}"),)
        return replace(_ask("deadline", path, fields, (200, 408, 504)), headers=headers)

    @property
    def most_tokens(self) -> int:
        """That a request with a limited key may use: twenty characters of four bytes, and its answer."""
        return 80 + self._max_tokens

    def with_key(self, ask: Ask) -> Ask:
        return replace(ask, key=self.keys[0]) if self.keys else ask

    def _text(self, longest: int = 60) -> str:
        words = " ".join(self._random.choices(TEXTS, k=self._random.randint(1, 4)))
        return words[: self._random.randint(1, longest)]

    def _maybe(self, chance: float, name: str, value: Any) -> dict[str, Any]:
        return {name: value} if self._random.random() < chance else {}

    def _sampling(self, top_temperature: float = 2.0) -> dict[str, Any]:
        choose, number, whole = self._random.choice, self._random.uniform, self._random.randint
        ids = [whole(0, self._vocab_size - 1) for _ in range(whole(1, 8))]
        return {
            **self._maybe(0.3, "model", self._model),
            **self._maybe(0.5, "temperature", round(number(0, top_temperature), 3)),
            **self._maybe(0.3, "top_p", choose((0, 1, round(number(0, 1), 3)))),
            **self._maybe(0.2, "top_k", choose((-1, 0, 1, 5, 10**9))),
            **self._maybe(0.2, "min_p", round(number(0, 1), 3)),
            **self._maybe(0.3, "seed", choose((0, -1, 2**63 - 1, -(2**63), whole(0, 10**6)))),
            **self._maybe(0.2, "presence_penalty", round(number(-2, 2), 2)),
            **self._maybe(0.2, "frequency_penalty", round(number(-2, 2), 2)),
            **self._maybe(0.2, "repetition_penalty", round(number(0.5, 2), 2)),
            **self._maybe(0.2, "logit_bias", {str(i): number(-100, 100) for i in ids}),
            **self._maybe(0.3, "stop_token_ids", ids),
            **self._maybe(0.2, "ignore_eos", choose((True, False))),
            **self._maybe(0.2, "include_stop_str_in_output", True),
            **self._maybe(0.2, "skip_special_tokens", False),
            **self._maybe(0.1, "priority", whole(-1000, 1000)),
            **self._maybe(0.1, "cache_salt", choose("abc")),
            **self._maybe(0.1, "truncate_prompt_tokens", whole(1, 40)),
            **self._maybe(0.6, "stream", True),
            **self._maybe(0.1, "unknown_" + choose("abc"), [None, {}]),
        }

    def _openai(self) -> dict[str, Any]:
        fields = {
            **self._sampling(),
            "max_tokens": self._random.randint(1, self._max_tokens),
            **self._maybe(0.3, "stop", self._random.choice((["e", " w"], "a", [self._text(3)], ["\ufffd"]))),
            **self._maybe(0.1, "timings", True), **self._maybe(0.1, "return_token_ids", True),
            **self._maybe(0.1, "request_id", f"own-{self._random.randint(0, 9)}"),
        }  # fmt: skip
        if self._random.random() < 0.2:
            fields["min_tokens"] = self._random.randint(0, fields["max_tokens"])
        if fields.get("stream") and self._random.random() < 0.6:
            fields["stream_options"] = {"include_usage": True, **self._maybe(0.3, "continuous_usage_stats", True)}
        return fields

    def _conversation(self) -> list[dict[str, Any]]:
        turns = self._random.randint(1, 3)
        roles = ["user", "assistant"] * turns
        return [{"role": role, "content": self._text()} for role in roles[: 2 * turns - 1]]

    def _chat(self) -> tuple[str, dict[str, Any]]:
        fields = {**self._openai(), **self._maybe(0.3, "n", self._random.randint(1, SEQUENCES))}
        if self._random.random() < 0.3:
            fields |= {"logprobs": True, **self._maybe(0.7, "top_logprobs", self._random.randint(0, 20))}
        if self._random.random() < 0.15:
            fields |= {"tools": TOOLS, "tool_choice": self._random.choice(("auto", "none"))}
        fields |= self._maybe(0.1, "prompt_logprobs", self._random.randint(0, 20))
        what = {"prompt": self._text()} if self._random.random() < 0.1 else {"messages": self._conversation()}
        return self._random.choice(("/v1/chat/completions", "/chat/completions")), {**what, **fields}

    def _completion(self) -> tuple[str, dict[str, Any]]:
        ids = [self._random.randrange(self._vocab_size) for _ in range(self._random.randint(1, 60))]
        prompt = self._random.choice((self._text(), ids, [self._text(), self._text()], [ids, ids[:1]]))
        fields = {"prompt": prompt, **self._openai(), **self._maybe(0.3, "n", self._random.randint(1, SEQUENCES // 2))}
        count = self._random.randint(0, 20)
        fields |= self._random.choice(({}, {}, {"echo": True}, {"logprobs": count}, {"echo": True, "logprobs": count},
                                       {"prompt_logprobs": count}))  # fmt: skip
        if fields.get("echo") and self._random.random() < 0.3:
            fields |= {"max_tokens": 0, "min_tokens": 0}
        return "/v1/completions", fields

    def _response(self) -> tuple[str, dict[str, Any]]:
        asked = self._random.choice((self._text(), self._conversation()))
        return "/v1/responses", {"input": asked, "max_output_tokens": self._random.randint(1, self._max_tokens),
                                 **self._sampling(), **self._maybe(0.2, "instructions", self._text())}  # fmt: skip

    def _message(self) -> tuple[str, dict[str, Any]]:
        fields = {**self._sampling(1.0), "model": self._model, "max_tokens": self._random.randint(1, self._max_tokens),
                  "messages": self._conversation(), **self._maybe(0.2, "system", self._text()),
                  **self._maybe(0.2, "stop_sequences", ["e"])}  # fmt: skip
        return "/v1/messages", fields

    def _tokenize(self) -> tuple[str, dict[str, Any]]:
        what = self._random.choice(({"prompt": self._text(20) * 50}, {"messages": self._conversation()}))
        return "/tokenize", {**what, **self._maybe(0.5, "return_token_strs", True)}

    def _detokenize(self) -> tuple[str, dict[str, Any]]:
        return "/detokenize", {"tokens": [self._random.randrange(self._vocab_size) for _ in range(self._random.randint(0, 99))]}

    def _bad(self) -> Ask:
        kind, statuses, change = self._random.choice(self._faults())
        path, fields = self._random.choice((self._chat, self._completion, self._response, self._message))()
        return change(kind, path, fields, statuses)

    def _faults(self) -> list[tuple[str, tuple[int, ...], Callable[..., Ask]]]:
        def field_of(**wrong: Any) -> Callable[..., Ask]:
            return lambda kind, path, fields, statuses: _ask(kind, path, {**fields, **wrong}, statuses)

        def raw(change: Callable[[bytes], bytes]) -> Callable[..., Ask]:
            def make(kind: str, path: str, fields: dict[str, Any], statuses: tuple[int, ...]) -> Ask:
                return Ask(kind, path, change(json.dumps(fields).encode()), statuses)

            return make

        def elsewhere(**where: Any) -> Callable[..., Ask]:
            def make(kind: str, path: str, fields: dict[str, Any], statuses: tuple[int, ...]) -> Ask:
                return Ask(kind, **{"path": path, "body": json.dumps(fields).encode(), "statuses": statuses, **where})

            return make

        draw, bad = self._random, (400,)
        text = draw.choice(("é", "🙂", "word ")) * (8 * self._context)
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
            ("huge", (413,), raw(lambda body: body[:-1] + b" " * self._max_body + b"}")),
            ("wrong type", bad, field_of(temperature=draw.choice(("1", True, [], {})))),
            ("out of range", bad, field_of(top_p=draw.choice((-1, 1.5, 1e300)))),
            ("integer out of range", bad, field_of(seed=draw.choice((2**63, -(2**64), 10**30, 0.5)))),
            ("id out of vocabulary", bad, field_of(stop_token_ids=[draw.choice((self._vocab_size, 2**31, 2**70, -1))])),
            ("bias of no token", bad, field_of(logit_bias={draw.choice(("x", "-1", "9" * 40, "")): 1})),
            ("no such model", (404,), field_of(model=draw.choice(("gpt-4", "../..", "a" * 3000)))),
            ("too long", bad, lambda kind, path, fields, statuses: _ask(kind, "/v1/chat/completions", {
                "messages": [{"role": "user", "content": text}], "max_tokens": 1}, statuses)),
            ("image", bad, lambda kind, path, fields, statuses: _ask(kind, "/v1/chat/completions", {
                "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, statuses)),
            ("more room than there is", bad, lambda kind, path, fields, statuses: _ask(kind, "/v1/completions", {
                "prompt": "a", "max_tokens": draw.choice((self._context + 1, 2**62))}, statuses)),
            ("content type", (415,), elsewhere(content_type=draw.choice(("text/plain", "application/xml", "x")))),
            ("unknown path", (404,), elsewhere(path=draw.choice(("/v1/nothing", "/v1/chat/completions/", "/%00", "//")))),
            ("wrong method", (405,), elsewhere(method=draw.choice(("PUT", "DELETE", "PATCH")))),
            ("no body", (400, 415), elsewhere(body=b"")),
            ("bad deadline", bad, elsewhere(headers=(("x-request-timeout", draw.choice(("0", "-1", "nan", "soon"))),))),
            ("schema nobody can keep to", bad, lambda kind, path, fields, statuses: _ask(kind, "/v1/chat/completions", {
                "messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_schema", "json_schema": {
                    "name": "x", "schema": draw.choice(({"type": "x"}, {"not": {}}, {"$ref": "#/none"}))}}}, statuses)),
            ("tool that is not there", bad, lambda kind, path, fields, statuses: _ask(kind, "/v1/chat/completions", {
                "messages": [{"role": "user", "content": "a"}], "tools": TOOLS, "tool_choice": {
                    "type": "function", "function": {"name": "nobody"}}}, statuses)),
        ]  # fmt: skip


def _ask(kind: str, path: str, fields: dict[str, Any], statuses: tuple[int, ...] = (200,)) -> Ask:
    return Ask(kind, path, json.dumps(fields).encode(), statuses, fields)
