"""Runs a job's choices on the engines: one token stream each, all of them cancelled as soon as one fails."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from deployments.api.choice import Choice
from deployments.api.job import Job
from deployments.api.service import Service
from deployments.protocol.errors import ApiError, bad_request, internal_error, loading, overloaded, replica_lost
from deployments.transport.base import NotReady, Overloaded, ReplicaLost, Transport
from model_core.errors import EngineDead, RequestError

log = logging.getLogger("mini_llm.api")

Sink = Callable[[Choice, str], Awaitable[None]]


async def run_job(service: Service, job: Job, sink: Sink) -> None:
    """Awaits sink(choice, new text) after every list of events; the call with choice.finish set is the choice's last.

    Raises ApiError. When it ends, in whatever way, no sequence of the job is left in an engine.
    """
    if job.choices[0].request.params.max_tokens == 0:  # echo alone
        for choice in job.choices:
            choice.finish = "length"
            await sink(choice, "")
    elif len(job.choices) == 1:
        await _run(service.transport, job.choices[0], sink)
    else:
        tasks = [asyncio.ensure_future(_run(service.transport, choice, sink)) for choice in job.choices]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def _run(transport: Transport, choice: Choice, sink: Sink) -> None:
    choice.sent_at = time.perf_counter()
    stream = transport.generate(choice.request)
    try:
        async for events in stream:
            text = ""
            for event in events:
                text += choice.feed(event)
                if choice.finish is not None:
                    break
            await sink(choice, text)
            if choice.finish is not None:
                return
        log.error("token stream of %s ended without a finish", choice.request.request_id)
        raise replica_lost(started=choice.tokens > 0)
    except RequestError as error:
        raise bad_request(str(error), param=error.param, code=error.code or "invalid_value") from None
    except NotReady:
        raise loading() from None
    except Overloaded as error:
        raise overloaded(str(error) or "The engine's queue is full.", retry_after_s=1) from None
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
