"""Decoding without a KV cache: every token recomputes the whole sequence. For comparison only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from model_core.engine.plan import check_request
from model_core.engine.request import Request, SamplingParams
from model_core.model.batch import Batch
from model_core.model.kv import KVCache
from model_core.tokenizer.detokenizer import Detokenizer

if TYPE_CHECKING:
    from model_core.engine.llm import LLM


def naive_tokens(llm: LLM, prompt_ids: list[int], params: SamplingParams) -> Iterator[int]:
    """Greedy token ids. The same model and ops as the engine, but each step is a prefill of all tokens so far, over
    pages that nothing remembers. Raises RequestError if the sequence would not fit."""
    parts = llm.engine.parts
    check_request(Request("naive", prompt_ids, params), parts.limits, parts.scheduler.pool)
    model, size = parts.runner.model, parts.runner.page_size
    pages = -(-(len(prompt_ids) + params.max_tokens) // size)
    kv = KVCache.empty(parts.model, pages, size, model.dtype, parts.device)
    tokens = list(prompt_ids)
    for _ in range(params.max_tokens):
        positions = torch.arange(len(tokens), device=parts.device)
        batch = Batch(
            token_ids=torch.tensor(tokens, device=parts.device), positions=positions, slot_mapping=positions,
            query_start=torch.tensor([0, len(tokens)], dtype=torch.int32, device=parts.device),
            context_len=torch.tensor([len(tokens)], dtype=torch.int32, device=parts.device),
            block_tables=torch.arange(pages, dtype=torch.int32, device=parts.device)[None, :],
            logit_rows=positions[-1:], query_lens=[len(tokens)], context_lens=[len(tokens)], num_decodes=0,
        )  # fmt: skip
        tokens.append(int(model.forward(batch, kv).argmax()))
        yield tokens[-1]
        if tokens[-1] in params.stop_ids or (not params.ignore_eos and tokens[-1] in parts.model.eos_ids):
            return


def naive_stream(llm: LLM, prompt_ids: list[int], params: SamplingParams, stop: Sequence[str]) -> Iterator[tuple[str, int]]:
    """(text, tokens) per step."""
    text = Detokenizer(llm.tokenizer, stop=stop, prompt_ids=prompt_ids)
    ends = () if params.ignore_eos else llm.engine.parts.model.eos_ids
    for token in naive_tokens(llm, prompt_ids, params):
        yield text.push([token] if token not in ends else []), 1
        if text.stopped is not None:
            return
    yield text.finish(), 0
