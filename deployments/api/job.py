"""A validated request → a job: prompts as token ids, one engine request per choice."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, replace
from typing import Any

from deployments.api.call_plan import CallPlan, plan_calls
from deployments.api.choice import Choice, LateStop, TextStream
from deployments.api.prompts import check_ids, encode_messages, encode_prompt, encode_prompt_as_chat
from deployments.api.record import Record
from deployments.api.service import Service
from deployments.protocol.errors import ApiError, bad_request, context_too_long, not_allowed
from deployments.protocol.messages import for_template
from deployments.protocol.prompt_logprobs import echo_json, prompt_json
from deployments.protocol.requests import ChatRequest, CompletionRequest, GenerationRequest
from deployments.protocol.responses import ChatLogprobs, Head, TextLogprobs, Usage
from deployments.protocol.values import INT64
from model_core.engine.request import EngineInfo, Request, SamplingParams
from model_core.engine.validate import MAX_PROMPT_LOGPROBS
from model_core.errors import RequestError
from model_core.tokenizer.detokenizer import Detokenizer


@dataclass
class Job:
    """One HTTP request's work. choices[p * n + k] answers prompts[p]; echoes[p] is the prompt's text, if asked for."""

    request: ChatRequest | CompletionRequest
    head: Head
    prompts: list[list[int]]
    choices: list[Choice]
    echoes: list[str] | None
    record: Record
    max_logprobs: int  # alternatives per token; -1: no log-probabilities

    @property
    def is_chat(self) -> bool:
        return isinstance(self.request, ChatRequest)

    def usage(self) -> Usage:
        """So far. A prompt counts once, however many choices answer it."""
        n = self.request.n
        return Usage(
            sum(map(len, self.prompts)),
            sum(choice.tokens for choice in self.choices),
            sum(choice.cached_tokens for choice in self.choices[::n]),
        )

    def logprobs(self, service: Service, choice: Choice) -> ChatLogprobs | TextLogprobs | None:
        """A new writer of `choice`'s log-probabilities, None if they were not asked for."""
        if self.max_logprobs < 0:
            return None
        if isinstance(self.request, ChatRequest):
            goes_on = self.request.continue_final_message
            return ChatLogprobs(service.tokenizer, service.tokenizer.strips_space and not goes_on)
        shown = service.tokenizer.byte_table(skip_special_tokens=self.request.skip_special_tokens)
        echoed = 0 if self.echoes is None else len(self.echoes[choice.index // self.request.n])
        return TextLogprobs(service.tokenizer, shown, choice.request.prompt_ids[-4:], echoed)

    async def prompt_json(self, service: Service, choice: Choice) -> dict[str, Any]:
        """What was asked for of these, once the prompt's log-probabilities are there: `logprobs` of an echoed prompt, and
        `prompt_logprobs`; of a chat, once."""
        request, names = self.request, service.tokenizer
        first = choice.index // request.n
        ids, parts = self.prompts[first], self.choices[first * request.n].prompt
        found: dict[str, Any] = {}

        def write() -> None:
            if request.prompt_logprobs is not None:
                found["prompt_logprobs"] = prompt_json(names, ids, parts, request.prompt_logprobs)
            if self.echoes is not None and self.max_logprobs >= 0:
                found["logprobs"] = echo_json(names, ids, parts, self.max_logprobs, self.echoes[first])

        if request.scored_logprobs is not None and not (self.is_chat and choice.index):
            await service.text_work(len(ids) * (request.scored_logprobs + 1), write)
        return found


async def chat_job(service: Service, request: ChatRequest, record: Record) -> Job:
    """Raises ApiError 400, 404, 503."""
    info = await service.check_model(request.model)
    _check_count(service, info, request, 1)
    ids, plan = await chat_prompt(service, info, request)
    _check_room(info, ids, "messages" if request.prompt is None else "prompt")
    return _job(service, info, request, record, [ids], None, plan)


async def chat_prompt(
    service: Service, info: EngineInfo, request: ChatRequest, *, to_count: bool = False
) -> tuple[list[int], CallPlan | None]:
    """The prompt's token ids; to_count: also those of one that is far too long. Raises ApiError 400."""
    try:
        plan = await plan_calls(service, request)
        if request.messages is None:
            assert request.prompt is not None
            ids = await encode_prompt_as_chat(service, info, request.prompt, request, plan)
        else:
            messages = for_template(request.messages)
            ids = await encode_messages(service, info, messages, request, plan, to_count=to_count)
    except RequestError as error:
        raise refused(error) from None
    return _last(info, ids, request), plan


async def completion_job(service: Service, request: CompletionRequest, record: Record) -> Job:
    """Raises ApiError 400, 404, 503."""
    info = await service.check_model(request.model)
    _check_count(service, info, request, len(request.prompt))
    prompts: list[list[int]] = []
    try:
        for prompt in request.prompt:
            ids = await encode_prompt(service, info, prompt, request, request.add_special_tokens, obey=True)
            prompts.append(_last(info, ids, request))
            if request.max_tokens or request.scored_logprobs is not None:
                _check_room(info, prompts[-1], "prompt", 1 if request.max_tokens else 0)
    except RequestError as error:
        raise refused(error) from None
    echoes = None
    if request.echo:
        decode, whole = service.tokenizer.decode, request.truncate_prompt_tokens is None
        echoes = [prompt if whole and isinstance(prompt, str) else decode(ids, skip_special_tokens=False)
                  for prompt, ids in zip(request.prompt, prompts, strict=True)]  # fmt: skip
    return _job(service, info, request, record, prompts, echoes)


def _job(
    service: Service,
    info: EngineInfo,
    request: ChatRequest | CompletionRequest,
    record: Record,
    prompts: list[list[int]],
    echoes: list[str] | None,
    plan: CallPlan | None = None,
) -> Job:
    if record.min_priority is not None and request.priority < record.min_priority:
        raise not_allowed("priority", f"The priority of this key's requests is {record.min_priority} at least, "
                                      f"but got {request.priority}.")  # fmt: skip
    check_ids(info, request.stop_token_ids, "stop_token_ids")
    check_ids(info, list(request.logit_bias), "logit_bias")
    _check_scored(request, sum(map(len, prompts)))
    is_chat = isinstance(request, ChatRequest)
    key = uuid.uuid4().hex  # the engine's name for it; a client's need not be unique
    head = Head(
        ("chatcmpl-" if is_chat else "cmpl-") + (request.request_id or key),
        "chat.completion" if is_chat else "text_completion",
        int(time.time()),
        request.model or info.model,
        service.fingerprint,
    )
    params = [_params(info, request, len(ids)) for ids in prompts]
    if plan is not None and plan.grammar is not None:
        params = [replace(one, grammar=plan.grammar) for one in params]
    choices = []
    for p, ids in enumerate(prompts):
        for k in range(request.n):
            index = p * request.n + k
            engine_request = Request(
                f"{key}-{index}", ids, _seeded(params[p], k), request.priority, request.cache_salt or ""
            )
            choices.append(_choice(service, info, request, engine_request, index, record.begun, plan))
    record.model = head.model
    record.stream = request.stream
    record.n = request.n
    logprobs = request.asked_logprobs
    return Job(request, head, prompts, choices, echoes, record, -1 if logprobs is None else logprobs)


def _choice(
    service: Service,
    info: EngineInfo,
    request: GenerationRequest,
    engine_request: Request,
    index: int,
    started_at: float,
    plan: CallPlan | None,
) -> Choice:
    # a chat answer starts a text (its first token's leading space is the format's, not the answer's), unless it goes on with
    # a message; a completion continues one
    starts = isinstance(request, ChatRequest) and not request.continue_final_message
    before = [] if starts else engine_request.prompt_ids[-64:]

    def detokenizer(stop: list[str], prompt_ids: list[int], keep: frozenset[int] = frozenset()) -> Detokenizer:
        return Detokenizer(
            service.tokenizer,
            stop=stop,
            keep=keep,
            include_stop=request.include_stop_str_in_output,
            skip_special_tokens=request.skip_special_tokens,
            prompt_ids=prompt_ids,
        )

    calls = None
    if plan is not None:
        assert isinstance(request, ChatRequest)
        calls = plan.reader(service, request, lambda keep: detokenizer([], before, keep))
        text: TextStream = calls
    elif request.stop and request.min_tokens:
        text = LateStop(detokenizer, request.stop, before, request.min_tokens)
    else:
        text = detokenizer(request.stop, before)
    return Choice(
        index,
        engine_request,
        text,
        calls=calls,
        eos_ids=info.eos_ids,
        include_stop=request.include_stop_str_in_output,
        metrics=service.metrics,
        started_at=started_at,
    )


def _params(info: EngineInfo, request: ChatRequest | CompletionRequest, prompt_tokens: int) -> SamplingParams:
    """max_tokens beyond the context is refused; within it, clamped to the room the prompt leaves (as vLLM does)."""
    limit = min(info.context_length, info.pool_tokens)
    asked = request.asked_tokens
    for name in ("max_completion_tokens", "max_tokens"):  # both, also where only the first counts
        value = getattr(request, name, None)
        if value is not None and value > limit:
            raise bad_request(
                f"{name} is too large: {value}. This model's context holds {limit} tokens, prompt and answer together.",
                param=name,
                code="integer_above_max_value",
            )
    room = limit - prompt_tokens
    max_tokens = room if asked is None else min(asked, room)
    if request.min_tokens > max_tokens:
        raise bad_request(
            f"'min_tokens' ({request.min_tokens}) is more than the {max_tokens} tokens that max_tokens and the context "
            "leave.",
            param="min_tokens",
        )
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=request.temperature if request.top_p else 0.0,  # top_p 0 keeps the best token alone
        top_k=max(request.top_k, 0),
        top_p=request.top_p or 1.0,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=request.logit_bias,
        seed=request.seed,
        logprobs=request.asked_logprobs,
        prompt_logprobs=request.scored_logprobs,
        stop_ids=tuple(request.stop_token_ids),
        ignore_eos=request.ignore_eos,
        min_tokens=request.min_tokens,
        grammar=request.grammar,
    )


def _seeded(params: SamplingParams, k: int) -> SamplingParams:
    """The k-th choice's parameters: seed + k, wrapped into int64, so that choices differ and each can be repeated. Of a
    prompt's choices only the first one scores it."""
    if k and params.prompt_logprobs is not None:
        params = replace(params, prompt_logprobs=None)
    if params.seed is None or k == 0:
        return params
    return replace(params, seed=(params.seed + k + INT64) % (2 * INT64) - INT64)


def _last(info: EngineInfo, ids: list[int], request: ChatRequest | CompletionRequest) -> list[int]:
    """What the request wants of a prompt: all, its last tokens, or those that leave room for max_tokens."""
    wanted = request.truncate_prompt_tokens
    if wanted is None:
        return ids
    if wanted < 0:
        answer = 1 if request.asked_tokens is None else request.asked_tokens
        wanted = max(1, min(info.context_length, info.pool_tokens) - answer)
    return ids[-wanted:]


def _check_room(info: EngineInfo, ids: list[int], noun: str, least: int = 1) -> None:
    limit = min(info.context_length, info.pool_tokens)
    if len(ids) + least > limit:
        raise context_too_long(limit, len(ids), noun=noun)


def _check_count(service: Service, info: EngineInfo, request: GenerationRequest, prompts: int) -> None:
    """More sequences than a model replica ever holds would be a 503 for ever."""
    most, n = info.max_seqs + service.limits.max_queued_requests, request.n
    if prompts * n > most:
        asked = f"n={n} is" if prompts == 1 else f"{prompts} prompts with n={n} are"
        raise bad_request(f"{asked} more than the {most} sequences this server takes at once.",
                          param="n" if prompts == 1 else "prompt")  # fmt: skip


def _check_scored(request: ChatRequest | CompletionRequest, tokens: int) -> None:
    """tokens: of all prompts."""
    asked = request.scored_logprobs
    if asked is not None and tokens * (asked + 1) > MAX_PROMPT_LOGPROBS:
        name = "prompt_logprobs" if asked == request.prompt_logprobs else "logprobs"
        raise bad_request(
            f"Log-probabilities of {tokens} prompt tokens with {asked} alternatives each are {tokens * (asked + 1)} values, "
            f"and an answer holds {MAX_PROMPT_LOGPROBS}. Lower '{name}', or send fewer or shorter prompts.",
            param=name,
        )


def refused(error: RequestError) -> ApiError:
    """What the tokenizer or the template refuses, as a 400."""
    return bad_request(str(error), param=error.param, code=error.code or "invalid_value")
