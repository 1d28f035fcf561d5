"""Other APIs than OpenAI's completions, as translations onto chat jobs: /v1/responses and Anthropic's /v1/messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from deployments.api.answer import Answer, Json, StreamedAnswer, WholeAnswer
from deployments.api.incoming import read_body
from deployments.api.job import Job, chat_job, chat_prompt
from deployments.api.service import Service
from deployments.protocol import anthropic_events, response_events, response_items
from deployments.protocol.anthropic_request import parse_anthropic
from deployments.protocol.errors import ApiError
from deployments.protocol.requests import ChatRequest
from deployments.protocol.response_request import ResponseRequest, parse_response
from deployments.protocol.responses import Entry
from deployments.tools.pieces import Block

_RESPONSE_NAMES = {"messages": "input", "max_completion_tokens": "max_output_tokens"}
_ANTHROPIC_NAMES = {"continue_final_message": "messages"}


class DialectRoutes:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def responses(self, request: Request) -> Answer:
        service = self._service
        asked, chat, unknown = parse_response(await read_body(service, request), service.limits)
        service.metrics.unknown_fields += len(unknown)
        with _renaming(_RESPONSE_NAMES):
            job = await chat_job(service, chat, request.scope["mini_llm.record"])
        _rename(job, "resp_")
        return StreamedResponse(service, job, asked) if asked.stream else WholeResponse(service, job, asked)

    async def messages(self, request: Request) -> Answer:
        service = self._service
        chat, unknown = parse_anthropic(await read_body(service, request), service.limits)
        service.metrics.unknown_fields += len(unknown)
        job = await self._message_job(chat, request)
        _rename(job, "msg_")
        return StreamedMessage(service, job) if chat.stream else WholeMessage(service, job)

    async def count_tokens(self, request: Request) -> Response:
        """{input_tokens}: of the prompt that /v1/messages would make of the same body. It may be longer than the context:
        clients ask so as to know whether to shorten it."""
        service = self._service
        body = await read_body(service, request)
        if body.get("max_tokens") is None:  # what only an answer needs
            body["max_tokens"] = 1
        chat, _ = parse_anthropic(body, service.limits)
        info = await service.check_model(chat.model)
        request.scope["mini_llm.record"].model = chat.model
        with _renaming(_ANTHROPIC_NAMES):
            ids, _ = await chat_prompt(service, info, chat, to_count=True)
        return Json({"input_tokens": len(ids)})

    async def _message_job(self, chat: ChatRequest, request: Request) -> Job:
        """max_tokens is required there, so that clients make one up: LiteLLM sends 128,000."""
        info = await self._service.info()
        assert chat.max_tokens is not None
        chat.max_tokens = min(chat.max_tokens, info.context_length, info.pool_tokens)
        with _renaming(_ANTHROPIC_NAMES):
            return await chat_job(self._service, chat, request.scope["mini_llm.record"])


class WholeResponse(WholeAnswer):
    def __init__(self, service: Service, job: Job, asked: ResponseRequest) -> None:
        super().__init__(service, job)
        self._asked = asked

    def _body(self, outputs: list[list[Block]], entries: list[list[Entry]]) -> dict[str, Any]:
        job, finish = self._job, self._job.choices[0].finish
        output = response_items.items(job.head, outputs[0], finish)
        return response_events.response(job.head, self._asked, response_items.status_of(finish), output, job.usage())


class StreamedResponse(StreamedAnswer):
    def __init__(self, service: Service, job: Job, asked: ResponseRequest) -> None:
        super().__init__(service, job)
        self._events = response_events.ResponseEvents(job.head, asked)

    def _lines(self) -> Sequence[response_events.ResponseEvents]:
        return [self._events]

    def _last(self) -> bytes:
        return self._events.closing(self._job.usage())

    def _farewell(self, error: ApiError) -> bytes:
        return self._events.failed(error, self._job.usage())


class WholeMessage(WholeAnswer):
    def _body(self, outputs: list[list[Block]], entries: list[list[Entry]]) -> dict[str, Any]:
        job, choice = self._job, self._job.choices[0]
        content = [anthropic_events.block(one) for one in outputs[0] or [""]]
        return anthropic_events.message(job.head, content, job.usage(), choice.reason, choice.stop_reason)


class StreamedMessage(StreamedAnswer):
    _heartbeat = anthropic_events.PING

    def __init__(self, service: Service, job: Job) -> None:
        super().__init__(service, job)
        self._events = anthropic_events.AnthropicEvents(job.head, job.usage)

    def _lines(self) -> Sequence[anthropic_events.AnthropicEvents]:
        return [self._events]

    def _last(self) -> bytes:
        return self._events.closing(self._job.usage())

    def _farewell(self, error: ApiError) -> bytes:
        return anthropic_events.error_event(error)


def _rename(job: Job, prefix: str) -> None:
    """Give the answer the id of its API; the engine knows the other one."""
    job.head = job.head._replace(id=prefix + job.head.id.partition("-")[2])


@contextmanager
def _renaming(names: dict[str, str]) -> Iterator[None]:
    """Errors about the chat request name the fields that the client sent."""
    try:
        yield
    except ApiError as error:
        for ours, theirs in names.items():
            if error.param == ours:
                error.param = theirs
                error.message = error.message.replace(ours, theirs)
        raise
