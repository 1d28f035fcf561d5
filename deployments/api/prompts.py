"""What a request brings → the token ids of a prompt."""

from __future__ import annotations

from typing import Any, Protocol

from deployments.api.call_plan import CallPlan
from deployments.api.service import Service
from deployments.protocol.errors import bad_request, context_too_long
from deployments.protocol.messages import check_template_kwargs
from deployments.protocol.requests import ChatRequest, GenerationRequest
from deployments.protocol.tools import Function
from deployments.tools.prompt import with_tools
from model_core.engine.request import EngineInfo


class Conversing(Protocol):
    """The fields of a request that say how its messages are rendered."""

    continue_final_message: bool
    chat_template_kwargs: dict[str, Any]

    @property
    def generation_prompt(self) -> bool: ...


async def encode_conversation(
    service: Service,
    messages: list[dict[str, Any]],
    functions: tuple[Function, ...],
    asked: Conversing,
    extra: dict[str, Any] | None = None,
) -> list[int]:
    """messages: as protocol/messages.py makes them. extra: arguments of the template that the client's own may replace.

    Raises ApiError 400 and RequestError.
    """
    kwargs = {**(extra or {}), **check_template_kwargs(asked.chat_template_kwargs)}
    tools = [function.for_template() for function in functions]
    told, more = with_tools(messages, tools, service.tokenizer, service.calls)
    chars = sum(len(message["content"]) for message in told) + (len(str(tools)) if more else 0)
    return await service.text_work(
        chars,
        lambda: service.tokenizer.encode_chat(
            told, add_generation_prompt=asked.generation_prompt, continue_final_message=asked.continue_final_message,
            **kwargs, **more,
        ),
    )  # fmt: skip


async def encode_messages(
    service: Service, info: EngineInfo, messages: list[dict[str, Any]], request: ChatRequest, plan: CallPlan | None,
    *, to_count: bool = False,
) -> list[int]:  # fmt: skip
    """The prompt of a chat; to_count: however long. Raises ApiError 400 and RequestError."""
    least = sum(service.least_tokens(message["content"]) for message in messages)
    if least >= info.context_length and request.truncate_prompt_tokens is None and not to_count:
        raise context_too_long(info.context_length, least, noun="messages", at_least=True)
    effort = request.reasoning_effort
    extra = None if effort is None else {"reasoning_effort": effort}
    return await encode_conversation(service, messages, plan.tools.functions if plan else (), request, extra)


async def encode_prompt_as_chat(
    service: Service, info: EngineInfo, prompt: str, request: ChatRequest, plan: CallPlan | None
) -> list[int]:
    """A bare prompt at the chat endpoint is one user message; a model without a chat template continues it as text. Raises
    ApiError 400 and RequestError."""
    if service.tokenizer.chat_template is None and plan is None:
        return await encode_prompt(service, info, prompt, request, True)
    return await encode_messages(service, info, [{"role": "user", "content": prompt}], request, plan)


async def encode_prompt(
    service: Service, info: EngineInfo, prompt: str | list[int], request: GenerationRequest, special: bool,
    *, obey: bool = False,
) -> list[int]:  # fmt: skip
    """special: with the tokenizer's own prefix. obey: control tokens that a text spells out are meant. Raises ApiError 400 and
    RequestError."""
    if not isinstance(prompt, str):
        check_ids(info, prompt, "prompt")
        return prompt
    least = service.least_tokens(prompt)
    if least >= info.context_length and request.truncate_prompt_tokens is None:
        raise context_too_long(info.context_length, least, noun="prompt", at_least=True)
    ids = await service.text_work(
        len(prompt), lambda: service.tokenizer.encode(prompt, add_special_tokens=special, allow_special=obey)
    )
    if not ids:
        raise bad_request("The prompt is empty: send at least one token.", param="prompt")
    return ids


def check_ids(info: EngineInfo, ids: list[int], param: str) -> None:
    """Raises ApiError 400 for an id that the model has not."""
    if ids and (min(ids) < 0 or max(ids) >= info.vocab_size):
        bad = next(i for i in ids if not 0 <= i < info.vocab_size)
        raise bad_request(
            f"Invalid '{param}': token id {str(bad)[:24]} is outside the vocabulary of {info.vocab_size} tokens.",
            param=param,
        )
