"""The two forms of an answer: a whole JSON object, or server-sent events while the tokens come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deployments.api.choice import Choice
from deployments.api.job import Job
from deployments.api.run import run_job
from deployments.api.service import Service
from deployments.api.sse import SseWriter
from deployments.api.supervise import supervise, timeout_of
from deployments.api.timings import decode_seconds, timings
from deployments.protocol.errors import ApiError
from deployments.protocol.events import (
    DONE,
    HEARTBEAT,
    ChatEvents,
    Line,
    TextEvents,
    error_event,
    last_event,
)
from deployments.protocol.responses import Entry, Head, Usage, chat_choice, text_choice, text_of, whole
from deployments.tools.pieces import Block, Piece, joined

FAREWELL_S = 5.0


class Json(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


class Answer:
    """An ASGI app that runs the job under admission and supervision; `_produce` says how its text is sent."""

    def __init__(self, service: Service, job: Job) -> None:
        self._service = service
        self._job = job
        self._blocked_since: float | None = None
        self._unfinished = "abort"  # why a choice has no finish reason

    def last_token_at(self) -> float | None:
        return max((choice.last_token_at for choice in self._job.choices if choice.last_token_at), default=None)

    def blocked_since(self) -> float | None:
        return self._blocked_since

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, job = self._service, self._job
        scope["mini_llm.job"] = job  # for a span
        count = len(job.choices)
        await service.gate.check(count)
        own = timeout_of(scope)
        with service.gate.hold(count):
            self._count()
            try:
                await supervise(self._produce(scope, send), receive, self, service.limits, service.stopping, own)
            except ApiError as error:
                is_fault = error.type == "server_error" or error.code == "replica_lost"
                self._unfinished = "error" if is_fault else "abort"
                if not await self._fail(error):
                    raise
            finally:
                self._end()
                begun = bool(job.record.status) or self.last_token_at() is not None
                if not begun and any(choice.refused for choice in job.choices):
                    self._forget()
                else:
                    self._account()

    async def _produce(self, scope: Scope, send: Send) -> None:
        raise NotImplementedError

    async def _fail(self, error: ApiError) -> bool:
        """Reports an error in an answer that has begun; False if it has not, so that a plain error can be sent."""
        return False

    def _end(self) -> None:
        """Called once, however the request ended."""

    def _count(self) -> Usage:
        """The tokens so far, also into the record: a key's allowance is charged by it when the answer begins and ends."""
        record, usage = self._job.record, self._job.usage()
        record.prompt_tokens, record.completion_tokens, record.cached_tokens = usage
        return usage

    def _forget(self) -> None:
        """A model replica has refused it: the same as if it had not been let in, which is counted where it is told."""
        record = self._job.record
        record.prompt_tokens = record.completion_tokens = record.cached_tokens = None

    def _account(self) -> None:
        """Metrics and the access record, however the request ended."""
        job, metrics = self._job, self._service.metrics
        self._count()
        record = job.record
        record.finish = ",".join(choice.reason or self._unfinished for choice in job.choices)
        firsts = [choice.first_token_at for choice in job.choices if choice.first_token_at is not None]
        if firsts:
            record.ttft_ms = round((min(firsts) - record.begun) * 1e3, 2)
        metrics.request_latency.observe(record.seconds())
        metrics.n.observe(job.request.n)
        metrics.max_generation.observe(max(choice.tokens for choice in job.choices))
        waits = [choice.waits for choice in job.choices if choice.waits is not None]
        if waits:
            record.queue_ms, record.prefill_ms = (round(max(times) * 1e3, 2) for times in zip(*waits, strict=True))
        slowest = 0.0
        for choice in job.choices:
            metrics.finished[choice.finish or self._unfinished] += 1
            if choice.calls is not None:
                metrics.tool_calls["complete"] += choice.calls.whole
                metrics.tool_calls["broken"] += choice.calls.begun - choice.calls.whole
            metrics.prompt_tokens.observe(len(choice.request.prompt_ids))
            metrics.cached_tokens += choice.cached_tokens  # of each that computed the prompt, as prompt_tokens are
            metrics.generation_tokens.observe(choice.tokens)
            metrics.max_tokens.observe(choice.request.params.max_tokens)
            spent = decode_seconds(choice)
            if choice.waits is not None:
                metrics.inference_time.observe(choice.waits[1] + (spent or 0.0))
            if spent is not None:
                metrics.decode_time.observe(spent)
                metrics.time_per_output_token.observe(spent / (choice.tokens - 1))
                slowest = max(slowest, spent / (choice.tokens - 1))
        if slowest:
            record.tpot_ms = round(slowest * 1e3, 3)
        metrics.count_gen_ai(
            "chat" if job.is_chat else "text_completion",
            duration=record.seconds(),
            first=min(firsts) - record.begun if firsts else None,
            further=slowest or None,
        )


class WholeAnswer(Answer):
    _prompts: list[dict[str, Any]]  # per prompt, see Job.prompt_json

    async def _produce(self, scope: Scope, send: Send) -> None:
        job = self._job
        pieces: list[list[Piece]] = [[] for _ in job.choices]
        entries: list[list[Entry]] = [[] for _ in job.choices]

        for choice in job.choices if job.request.return_token_ids else ():
            choice.ids = []

        async def collect(choice: Choice, text: str) -> None:
            pieces[choice.index] += choice.take_pieces(text)
            if job.max_logprobs >= 0:
                entries[choice.index].extend(choice.take_entries())

        await run_job(self._service, job, collect)
        self._prompts = [await job.prompt_json(self._service, choice) for choice in job.choices[:: job.request.n]]
        self._count()
        self._blocked_since = time.perf_counter()
        await Json(self._body([joined(parts) for parts in pieces], entries))(scope, _no_receive, send)

    def _body(self, outputs: list[list[Block]], entries: list[list[Entry]]) -> dict[str, Any]:
        """The answer, given each choice's texts and calls, and log-probability entries."""
        job = self._job
        choices = []
        for choice in job.choices:
            blocks = outputs[choice.index]
            writer = job.logprobs(self._service, choice)
            logprobs = None if writer is None else writer.json(entries[choice.index], job.max_logprobs)
            prompt = self._prompts[choice.index // job.request.n]
            if logprobs is not None and "logprobs" in prompt:
                logprobs = {key: [*prompt["logprobs"][key], *values] for key, values in logprobs.items()}
            if job.is_chat:
                choices.append(chat_choice(choice.index, blocks, logprobs, choice.reason, choice.stop_reason))
            else:
                text = ("" if job.echoes is None else job.echoes[choice.index // job.request.n]) + text_of(blocks)
                choices.append(text_choice(choice.index, text, logprobs, choice.finish, choice.stop_reason))
            if choice.ids is not None:
                choices[-1]["token_ids"] = choice.ids
                if not job.is_chat:
                    choices[-1]["prompt_token_ids"] = choice.request.prompt_ids
            if not job.is_chat and "prompt_logprobs" in prompt:
                choices[-1]["prompt_logprobs"] = prompt["prompt_logprobs"]
        body = whole(job.head, choices, job.usage())
        if job.request.return_token_ids and job.is_chat:
            body["prompt_token_ids"] = job.prompts[0]
        if job.is_chat and "prompt_logprobs" in self._prompts[0]:
            body["prompt_logprobs"] = self._prompts[0]["prompt_logprobs"]
        if job.request.timings:
            body["timings"] = timings(job)
        return body


class StreamedAnswer(Answer):
    """The 200 is held back until the first tokens (or the first heartbeat), so that earlier errors are plain JSON."""

    _sse: SseWriter | None = None
    _heartbeat = HEARTBEAT  # once the answer has begun
    _prompts: list[dict[str, Any]]  # per choice, filled for its first event: see Job.prompt_json

    def blocked_since(self) -> float | None:
        return None if self._sse is None else self._sse.blocked_since

    async def _produce(self, scope: Scope, send: Send) -> None:
        job, service = self._job, self._service
        tells_usage = job.request.continuous_usage
        self._prompts = [{} for _ in job.choices]
        lines = self._lines()
        logprobs = [job.logprobs(service, choice) for choice in job.choices]
        is_open = [False] * len(job.choices)
        sse = self._sse = SseWriter(send, scope.get("mini_llm.send", send), service.limits.heartbeat_s)

        async def pass_on(choice: Choice, text: str) -> None:
            i = choice.index
            line = lines[i]
            usage = job.usage() if tells_usage else None
            if not is_open[i]:
                is_open[i] = True
                self._prompts[i].update(await job.prompt_json(service, choice))
                sse.add(line.open(usage))
                sse.heartbeat = self._heartbeat
            shown = None
            writer = logprobs[i]
            if writer is not None and (entries := choice.take_entries()):
                shown = writer.json(entries, job.max_logprobs)
            if choice.calls is not None:
                for piece in choice.take_pieces(text):
                    write = line.text if isinstance(piece, str) else line.call
                    sse.add(write(piece, shown, usage))  # type: ignore[arg-type]
                    shown = None
                text = ""
            if text or shown:
                sse.add(line.text(text, shown, usage))
            if choice.reason is not None:
                sse.add(line.finish(choice.reason, choice.stop_reason, usage))
                if all(other.finish is not None for other in job.choices):
                    return  # finish() sends it together with what comes last
            await sse.flush()

        try:
            await run_job(service, job, pass_on)
            sse.add(self._last())
            await sse.finish()
        finally:
            sse.stop()

    def _head(self) -> Head:
        head = self._job.head
        return head._replace(object="chat.completion.chunk") if self._job.is_chat else head

    def _lines(self) -> Sequence[Line]:
        """Writers of events, one per choice."""
        job, request, head = self._job, self._job.request, self._head()
        kind = partial(ChatEvents, may_call=job.choices[0].calls is not None) if job.is_chat else TextEvents
        lines = []
        for choice in job.choices:
            if request.return_token_ids:
                choice.ids = []
            lines.append(kind(
                head, choice.index, include_usage=request.include_usage,
                echo=None if job.echoes is None else job.echoes[choice.index // request.n],
                prompt_ids=choice.request.prompt_ids if request.return_token_ids else None, ids=choice.ids,
                prompt=self._prompts[choice.index],
            ))  # fmt: skip
        return lines

    def _last(self) -> bytes:
        """Events after those of all choices."""
        job, request = self._job, self._job.request
        if not (request.include_usage or request.timings):
            return DONE
        usage = job.usage() if request.include_usage else None
        return last_event(self._head(), usage, timings(job) if request.timings else None) + DONE

    def _farewell(self, error: ApiError) -> bytes:
        """Events of an answer that goes wrong after it began."""
        return error_event(error.body()) + DONE

    def _end(self) -> None:
        if self._sse is not None:
            self._sse.close()

    async def _fail(self, error: ApiError) -> bool:
        sse = self._sse
        if sse is None or not sse.started:
            return False
        self._job.record.error = error.code or error.type
        sse.add(self._farewell(error))
        with suppress(asyncio.TimeoutError):  # of a reader that stopped reading
            await asyncio.wait_for(sse.finish(), FAREWELL_S)
        return True


async def _no_receive() -> Any:
    raise AssertionError("a whole answer reads nothing")


def answer(service: Service, job: Job) -> Answer:
    return StreamedAnswer(service, job) if job.request.stream else WholeAnswer(service, job)
