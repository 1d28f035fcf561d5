"""Runs a job's choices on the engines: one token stream each, all of them cancelled as soon as one fails."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

from deployments.api.choice import Choice
from deployments.api.job import Job
from deployments.api.service import Service
from deployments.protocol.errors import ApiError, bad_request, internal_error, loading, overloaded, replica_lost
from deployments.transport.base import NotReady, Overloaded, ReplicaLost, Transport
from model_core.errors import EngineDead, RequestError

log = logging.getLogger("mini_llm.api")

RETRY_S = 0.1  # of a choice that a full model replica has refused, although the request was let in
SHARED_PROMPT = 64  # tokens; computing a shorter one again costs less than the wait for it

Sink = Callable[[Choice, str], Awaitable[None]]


async def run_job(service: Service, job: Job, sink: Sink) -> None:
    """Awaits sink(choice, new text) after every list of events; the call with choice.finish set is the choice's last.

    Raises ApiError. When it ends, in whatever way, no sequence of the job is left in an engine.
    """
    if len(job.choices) == 1:
        await _run(service.transport, job.choices[0], sink)
    else:
        tasks = [asyncio.ensure_future(work) for work in _led(service.transport, job, sink)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


def _led(transport: Transport, job: Job, sink: Sink) -> Iterator[Coroutine[Any, Any, None]]:
    """A coroutine per choice. Of the choices of a long prompt the first computes it; the others start with its first
    token, when the prompt's pages are in the prefix cache, and share them. So they do with log-probabilities of a prompt. If
    other HTTP replicas have filled the engine meanwhile, they wait: the request was let in.
    """
    for first in range(0, len(job.choices), job.request.n):
        leader, *others = job.choices[first : first + job.request.n]
        if len(leader.request.prompt_ids) < SHARED_PROMPT and leader.request.params.prompt_logprobs is None:
            yield from (_run(transport, choice, sink) for choice in (leader, *others))
            continue
        computed = asyncio.Event()
        yield _run(transport, leader, _setting(computed, sink))
        yield from (_after(computed, transport, choice, sink) for choice in others)


def _setting(event: asyncio.Event, sink: Sink) -> Sink:
    async def set_and_pass_on(choice: Choice, text: str) -> None:
        event.set()
        await sink(choice, text)

    return set_and_pass_on


async def _after(event: asyncio.Event, transport: Transport, choice: Choice, sink: Sink) -> None:
    await event.wait()
    while True:
        try:
            return await _run(transport, choice, sink)
        except ApiError as error:
            if error.code != "engine_overloaded":
                raise
        await asyncio.sleep(RETRY_S)  # the answer has begun: no time for a 503


async def _run(transport: Transport, choice: Choice, sink: Sink) -> None:
    params = choice.request.params
    if params.max_tokens == 0 and params.prompt_logprobs is None:  # echo alone
        choice.finish = "length"
        await sink(choice, "")
        return
    choice.sent_at = time.perf_counter()
    stream = transport.generate(choice.request)
    try:
        async for events in stream:
            text = ""
            for event in events:
                text += choice.feed(event)
                if choice.finish is not None:
                    break
            if choice.tokens or choice.finish is not None:  # else only more of the prompt's log-probabilities came
                await sink(choice, text)
            if choice.finish is not None:
                return
        log.error("token stream of %s ended without a finish", choice.request.request_id)
        raise replica_lost(started=choice.tokens > 0)
    except (RequestError, NotReady, Overloaded) as error:
        choice.refused = True
        raise _refusal(error) from None
    except (ReplicaLost, EngineDead) as error:
        log.error("replica lost while serving %s: %s", choice.request.request_id, error)
        raise replica_lost(started=choice.tokens > 0) from None
    except ApiError:
        raise
    except Exception:
        log.exception("serving %s failed", choice.request.request_id)
        raise internal_error() from None
    finally:
        await stream.aclose()  # aborts the sequence if it has not ended: a stop string, a failure, a client that left


def _refusal(error: RequestError | NotReady | Overloaded) -> ApiError:
    if isinstance(error, RequestError):
        return bad_request(str(error), param=error.param, code=error.code or "invalid_value")
    if isinstance(error, NotReady):
        return loading()
    return overloaded(str(error) or "The engine's queue is full.", retry_after_s=1)
