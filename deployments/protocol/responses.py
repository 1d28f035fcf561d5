"""The JSON objects of answers: usage, log-probabilities, whole (not streamed) responses, model cards."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from deployments.tools.pieces import Block, Call
from model_core.engine.request import EngineInfo, TokenLogprobs

MIN_LOGPROB = -9999.0  # JSON has no -Infinity


class TokenNames(Protocol):
    """The part of a tokenizer that log-probabilities need."""

    def token_text(self, token_id: int, /) -> str: ...
    def token_bytes(self, token_id: int, /) -> bytes: ...


class Entry(NamedTuple):
    """A generated token whose text was sent, with its log-probabilities."""

    token_id: int
    logprobs: TokenLogprobs


class Usage(NamedTuple):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": 0},  # no model here thinks apart from its answer
        }


class ChatLogprobs:
    """`logprobs` of a chat choice, one writer for each. The concatenated `bytes` of all entries are the bytes of the content.

    strips_space: the content does not begin with the space that its first token has.
    """

    def __init__(self, names: TokenNames, strips_space: bool = False) -> None:
        self._names = names
        self._strip = b" " if strips_space else b""

    def json(self, entries: Sequence[Entry], top: int) -> dict[str, Any]:
        content = []
        for entry in entries:
            best = [self._token(*pair) for pair in entry.logprobs.top[:top]]
            content.append({**self._token(entry.token_id, entry.logprobs.logprob), "top_logprobs": best})
            self._strip = b""
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._names.token_bytes(token_id).removeprefix(self._strip)
        return {"token": data.decode(errors="replace"), "logprob": max(logprob, MIN_LOGPROB), "bytes": list(data)}


class TextLogprobs:
    """`logprobs` of a completion choice: parallel arrays. One per choice: it keeps the running `text_offset`.

    shown: bytes by id, as the text has them; special tokens may have none. before: the last ids of the prompt, which may end
    inside a character. offset: characters of an echo.
    """

    def __init__(self, names: TokenNames, shown: Sequence[bytes], before: Sequence[int] = (), offset: int = 0) -> None:
        self._names = names
        self._shown = shown
        self._offset = offset
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token_id in before:
            self._characters(token_id)

    def _characters(self, token_id: int) -> int:
        """That the text has once it has this token, too."""
        return len(self._decoder.decode(self._shown[token_id] if token_id < len(self._shown) else b""))

    def json(self, entries: Sequence[Entry], top: int) -> dict[str, Any]:
        tokens, offsets, tops = [], [], []
        for entry in entries:
            tokens.append(self._names.token_text(entry.token_id))
            offsets.append(self._offset)
            self._offset += self._characters(entry.token_id)
            tops.append(top_json(self._names, entry.token_id, entry.logprobs.logprob, entry.logprobs.top[:top]))
        return {
            "tokens": tokens,
            "token_logprobs": [max(entry.logprobs.logprob, MIN_LOGPROB) for entry in entries],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def top_json(names: TokenNames, token_id: int, logprob: float, best: Sequence[tuple[int, float]]) -> dict[str, float]:
    """{text: log-probability} of the best tokens and, always, the token itself: lm-eval compares it with the best. Of
    tokens with the same text the best one counts."""
    found: dict[str, float] = {}
    for other, value in (*best, (token_id, logprob)):
        found.setdefault(names.token_text(other), max(value, MIN_LOGPROB))
    return found


class Head(NamedTuple):
    """What every object and chunk of one answer begins with."""

    id: str
    object: str
    created: int  # Unix seconds
    model: str
    system_fingerprint: str

    def json(self) -> dict[str, Any]:
        return self._asdict()


def whole(head: Head, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
    """A complete, not streamed answer."""
    return {**head.json(), "service_tier": "default", "choices": choices, "usage": usage.json()}


def text_of(blocks: Sequence[Block]) -> str:
    return "".join(block for block in blocks if isinstance(block, str))


def chat_choice(
    index: int, blocks: Sequence[Block], logprobs: dict[str, Any] | None, finish: str | None, stop_reason: str | int | None
) -> dict[str, Any]:
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in blocks if isinstance(call, Call)
    ]  # fmt: skip
    text = text_of(blocks)
    message: dict[str, Any] = {"role": "assistant", "content": text or None if calls else text, "refusal": None}
    if calls:
        message["tool_calls"] = calls
    return {
        "index": index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": finish,
        "stop_reason": stop_reason,
    }


def text_choice(
    index: int, text: str, logprobs: dict[str, Any] | None, finish: str | None, stop_reason: str | int | None
) -> dict[str, Any]:
    return {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": finish,
        "stop_reason": stop_reason,
    }


def model_card(info: EngineInfo, created: int) -> dict[str, Any]:
    """One entry of /v1/models; load tools look for `max_model_len` (vLLM's name)."""
    return {
        "id": info.model,
        "object": "model",
        "created": created,
        "owned_by": "mini-llm-infra",
        "root": info.model,
        "parent": None,
        "max_model_len": info.context_length,
        "meta": {
            "family": info.family,
            "source": info.source,
            "n_params": info.parameters,
            "dtype": info.dtype,
            "device": info.device,
            "vocab_size": info.vocab_size,
            "pool_tokens": info.pool_tokens,
            "max_seqs": info.max_seqs,
        },
    }
