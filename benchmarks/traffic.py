"""Random requests as a public server gets them: good ones of every endpoint, broken ones, and clients of every manner."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from benchmarks import forms
from benchmarks.ask import TOOLS, Ask
from benchmarks.faults import faults

SEQUENCES = 4  # at most so many in one request
FORM_ROOM = 8  # times the tokens of other answers: the longest form has 150 bytes, each a token without merges
MANNERS = ("read", "read", "read", "read", "slow", "leave", "leave", "reset")
TEXTS = (
    "The sea is wide", "Straße, naïve café", "日本語のテキスト", "مرحبا بالعالم", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "e\u0301 a\u0308 n\u0303",
    "🙂\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308", "\u2028\u2029\ufeff", "<|im_start|>system\n<|im_end|>",
    "</s><s>[INST]", "{{ 7 * 7 }}{% raw %}", "\x00\x01\x1f", "   \n\t ", "'\"\\ $(x) `y`",
)  # fmt: skip


class Traffic:
    """The same seed makes the same requests. vocab_size, context: of the served model; max_body: the server's limit, bytes;
    keys: of a server that wants one, first one without limits, then some with."""

    def __init__(self, seed: int, *, model: str, vocab_size: int, context: int, max_body: int, max_tokens: int = 24,
                 keys: Sequence[str] = ()) -> None:  # fmt: skip
        self._random = random.Random(seed)
        self._model = model
        self._vocab_size = vocab_size
        self._limits = {"vocab_size": vocab_size, "context": context, "max_body": max_body}
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
            ask = Ask.of(path.rpartition("/")[2], path, fields)
            ask = replace(ask, headers=self._random.choice(((), (), (), (("x-request-timeout", "100"),))))
        ask = self.with_key(replace(ask, manner=self._random.choice(MANNERS)))
        if ask.manner in ("leave", "reset"):
            patience = self._random.choice((-self._random.randint(1, len(ask.body)), 0, 1, self._random.randint(2, 4000)))
            return replace(ask, patience=patience)
        return ask

    def crowd(self, count: int, key: str) -> list[Ask]:
        """So many requests for a key that may have one at a time."""
        fields = {"prompt": "a", "max_tokens": 20, "ignore_eos": True}
        return [replace(Ask.of("crowd", "/v1/completions", fields, (200, 429)), key=key) for _ in range(count)]

    def burst(self, sequences: int, tokens: int) -> list[Ask]:
        """Chat requests of at least so many sequences together, each of which may be answered by a 503. tokens: of each
        answer, so many that the first have not ended when the last come."""
        asks: list[Ask] = []
        while sum(ask.sequences for ask in asks) < sequences:
            path, fields = self._chat()
            fields |= {"n": 2, "max_tokens": tokens, "min_tokens": 0, "ignore_eos": True, "stop": [], "stop_token_ids": []}
            asks.append(self.with_key(Ask.of("burst", path, fields, (200, 503))))
        return asks

    def _keyed(self) -> Ask:
        """By somebody who must not get in, or only so often."""
        fields = {"prompt": self._text(20), "max_tokens": self._random.randint(1, self._max_tokens)}
        key = self._random.choice((None, "sk-nobody", *self.keys[1:], *self.keys[1:]))
        known = key in self.keys
        ask = Ask.of("key with limits" if known else "no key", "/v1/completions", fields, (200, 429) if known else (401,))
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
        return replace(Ask.of("calls" if form.tools else "structured", path, fields), form=form)

    def _hasty(self) -> Ask:
        """With a deadline that passes before the end of the answer, or after it. Serve's header means the same."""
        path, fields = "/v1/completions", {"prompt": self._text(), "max_tokens": 400, "ignore_eos": True}
        fields |= {**self._maybe(0.5, "stream", True), **self._maybe(0.3, "n", 2)}
        name = self._random.choice(("x-request-timeout", "x-request-timeout-seconds"))
        headers = ((name, f"{self._random.uniform(0.001, 0.5):.3f}"),)
        return replace(Ask.of("deadline", path, fields, (200, 408, 504)), headers=headers)

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
        kind, statuses, change = self._random.choice(faults(self._random, **self._limits))
        path, fields = self._random.choice((self._chat, self._completion, self._response, self._message))()
        return change(kind, path, fields, statuses)
