"""Log-probabilities of a prompt in the two forms that clients know: vLLM's `prompt_logprobs`, and OpenAI's `echo`."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from deployments.protocol.responses import MIN_LOGPROB, TokenNames, top_json
from model_core.engine.request import PromptLogprobs


class Row(NamedTuple):
    """A prompt token after the first. rank: 1 for a likeliest one; top: the best as (id, log-probability), best first."""

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


def rows(ids: Sequence[int], parts: Sequence[PromptLogprobs], top: int) -> Iterator[Row]:
    """Of all tokens of the prompt `ids` but the first, with `top` alternatives; parts: as the engine told them."""
    at = 1
    for part in parts:
        for i, (own, rank) in enumerate(zip(part.own, part.ranks, strict=True)):
            best = slice(i * part.count, i * part.count + top)
            yield Row(ids[at], own, rank, list(zip(part.top_ids[best], part.top_logprobs[best], strict=True)))
            at += 1
    assert at == len(ids), f"log-probabilities of {at} of {len(ids)} prompt tokens"


def prompt_json(
    names: TokenNames, ids: Sequence[int], parts: Sequence[PromptLogprobs], top: int
) -> list[dict[str, Any] | None]:
    """vLLM's: per token {id: {logprob, rank, decoded_token}}, the token itself first; null for the first token."""

    def one(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": max(logprob, MIN_LOGPROB), "rank": rank, "decoded_token": names.token_text(token_id)}

    found: list[dict[str, Any] | None] = [None]
    for token_id, logprob, rank, best in rows(ids, parts, top):
        entry = {str(token_id): one(token_id, logprob, rank)}
        for place, (other, value) in enumerate(best, 1):
            entry.setdefault(str(other), one(other, value, place))
        found.append(entry)
    return found


def echo_json(
    names: TokenNames, ids: Sequence[int], parts: Sequence[PromptLogprobs], top: int, text: str
) -> dict[str, Any]:
    """OpenAI's `logprobs` of an echoed prompt: parallel arrays, null for the first token. text: what is echoed."""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    starts, at = [], 0
    for token_id in ids:
        starts.append(at)
        at += len(decode(names.token_bytes(token_id)))
    # the text ends where the tokens do; what the tokenizer put in front (a begin token, a space) is not in it
    missing = at - len(text)
    own: list[float | None] = [None]
    tops: list[dict[str, float] | None] = [None]
    for token_id, logprob, _, best in rows(ids, parts, top):
        own.append(max(logprob, MIN_LOGPROB))
        tops.append(top_json(names, token_id, logprob, best))
    return {
        "tokens": [names.token_text(token_id) for token_id in ids],
        "token_logprobs": own,
        "top_logprobs": tops,
        "text_offset": [max(0, start - missing) for start in starts],
    }
