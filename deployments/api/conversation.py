"""A conversation → the token ids of its prompt, by the model's chat template."""

from __future__ import annotations

from typing import Any, Protocol

from deployments.api.service import Service
from deployments.protocol.messages import check_template_kwargs
from deployments.protocol.tools import Function
from deployments.tools.prompt import with_tools


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
