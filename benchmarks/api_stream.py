"""CPU per streamed token of the HTTP API alone: the real app, tokenizer and uvicorn over a transport in its process.

    python benchmarks/api_stream.py TOKENIZER_FOLDER_OR_GGUF [--streams 200] [--tokens 200] [--step-ms 20]

One token per stream and step. The client runs in its own process (uvloop, raw sockets, counts events). Reported: CPU
microseconds of the server process per token (user + system, idle steps subtracted: a second run of the ticker alone),
tokens per second, and the delay from a step's emission to the arrival of its event, both on one clock.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import resource
import statistics
import sys
import time
from collections.abc import AsyncGenerator
from functools import partial
from pathlib import Path

import uvicorn
import uvloop

from benchmarks.report import p99
from deployments.api.app import create_app
from deployments.protocol.limits import Limits
from model_core.engine.request import EngineInfo, EngineStats, Request, TokenEvent
from model_core.tokenizer import Tokenizer, load_tokenizer


class Ticker:
    """A transport whose engine is a timer: each step one token for every running sequence."""

    def __init__(self, tokenizer: Tokenizer, step_s: float) -> None:
        self._step_s = step_s
        self._live: dict[str, tuple[Request, list[TokenEvent], list[asyncio.Future[None] | None]]] = {}
        self._ids = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids]
        self._random = random.Random(0)
        self._vocab_size = tokenizer.vocab_size
        self.emitted: list[tuple[float, int]] = []

    async def start(self) -> None:
        self._task = asyncio.ensure_future(self._run())

    async def close(self) -> None:
        self._task.cancel()

    async def info(self) -> EngineInfo:
        return EngineInfo(
            "bench", "disk", "llama", 1, "float32", "cpu", 8192, 1 << 20, 256, self._vocab_size, (2,)
        )

    async def stats(self) -> list[EngineStats]:
        return [EngineStats(0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0)]

    async def dispatch_table(self) -> list[dict]:
        return []

    async def generate(self, request: Request) -> AsyncGenerator[list[TokenEvent], None]:
        pending: list[TokenEvent] = []
        waiter: list[asyncio.Future[None] | None] = [None]
        self._live[request.request_id] = (request, pending, waiter)
        left = request.params.max_tokens
        loop = asyncio.get_running_loop()
        try:
            while left:
                if not pending:
                    future = waiter[0] = loop.create_future()
                    await future
                events = pending[:]
                pending.clear()
                left -= len(events)
                if not left:
                    events[-1] = events[-1]._replace(finish="length")
                yield events
        finally:
            del self._live[request.request_id]

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due = max(due + self._step_s, loop.time())
            await asyncio.sleep(due - loop.time())
            now = time.perf_counter()
            for request, pending, waiter in self._live.values():
                pending.append(TokenEvent(request.request_id, [self._random.choice(self._ids)]))
                future, waiter[0] = waiter[0], None
                if future is not None and not future.done():
                    future.set_result(None)
            self.emitted.append((now, len(self._live)))


class Reader(asyncio.Protocol):
    def __init__(self, body: bytes, done: asyncio.Future[None]) -> None:
        self._body = body
        self._done = done
        self._tail = b""
        self.arrivals: list[float] = []

    def connection_made(self, transport) -> None:  # type: ignore[no-untyped-def]
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        transport.write(head + b"content-length: %d\r\n\r\n" % len(self._body) + self._body)

    def data_received(self, data: bytes) -> None:
        self.arrivals.append(time.perf_counter())
        if b"[DONE]" in data and not self._done.done():
            self._done.set_result(None)


def client(port: int, streams: int, tokens: int, results) -> None:  # type: ignore[no-untyped-def]
    async def run() -> list[list[float]]:
        loop = asyncio.get_running_loop()
        messages = [{"role": "user", "content": "Tell me a story."}]
        body = json.dumps({"messages": messages, "stream": True, "max_tokens": tokens}).encode()
        readers = []
        waits = []
        for _ in range(streams):
            done = loop.create_future()
            readers.append(Reader(body, done))
            await loop.create_connection(partial(next, iter(readers[-1:])), "127.0.0.1", port)
            waits.append(done)
        await asyncio.gather(*waits)
        return [reader.arrivals for reader in readers]

    results.put(uvloop.run(run()))


def cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def measure(tokenizer: Tokenizer, streams: int, tokens: int, step_s: float) -> dict:
    ticker = Ticker(tokenizer, step_s)
    app = create_app(ticker, tokenizer, Limits(max_queued_requests=10_000))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    serving = asyncio.ensure_future(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=client, args=(port, streams, tokens, results))
    process.start()
    while not any(live for _, live in ticker.emitted[-1:]):
        await asyncio.sleep(0.01)
    await asyncio.sleep(1.0)  # connections, templates and prompts are done: what follows is tokens alone
    ticker.emitted.clear()
    cpu_before, began = cpu(), time.perf_counter()
    while ticker.emitted[-1:] == [] or ticker.emitted[-1][1] == streams:
        await asyncio.sleep(0.05)
    spent, wall = cpu() - cpu_before, time.perf_counter() - began
    emitted = list(ticker.emitted)
    arrivals = await asyncio.get_running_loop().run_in_executor(None, results.get)
    process.join()
    idle_before = cpu()
    await asyncio.sleep(1.0)
    idle = (cpu() - idle_before) * wall
    server.should_exit = True
    await serving
    sent = sum(live for _, live in emitted)
    if not sent:
        sys.exit("the streams were over within the second that is not counted: ask for more --tokens")
    steps = [moment for moment, _ in emitted]
    delays = []
    for stream in arrivals:
        for moment in stream:
            before = [step for step in steps[-400:] if step <= moment] if moment > steps[0] else []
            if before and moment - before[-1] < 1:
                delays.append(moment - before[-1])
    return {
        "streams": streams,
        "tokens": sent,
        "tok_s": round(sent / wall),
        "cpu_us_per_token": round((spent - idle) / sent * 1e6, 1),
        "delay_ms_p50": round(statistics.median(delays) * 1e3, 2),
        "delay_ms_p99": round(p99(delays) * 1e3, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--step-ms", type=float, default=20.0)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.tokenizer)
    row = uvloop.run(measure(tokenizer, arguments.streams, arguments.tokens, arguments.step_ms / 1e3))
    print(json.dumps(row))


if __name__ == "__main__":
    main()
