"""What clients of `serve run serve_config.yaml` get: tokens/s, TTFT and ITL over HTTP at several concurrencies.

    python -m benchmarks.serving --model weight/SmolLM2-135M-Instruct --streams 1 8 32

Every stream asks for `--prompt` words and `--tokens` new tokens (greedy, end-of-sequence ignored) at the same time as the
others, over a connection that is open already; the clients are processes of their own on the same machine, one per four cores
(uvloop: one that reads lines by asyncio takes 20 us of CPU for an event, as much as the server). TTFT is from sending the
request, ITL between the arrivals of two events of one stream, each with a token, or with several if something is behind. A
round begins when the engine has no CUDA graphs left to capture. A first round of the same shape is not counted; then there are
as many as give --samples streams, --rounds at least (of 32 streams, one round's TTFT was 55 ms, another's 101).
Where a first token's time goes is what the server tells in `timings`, medians: queue_ms and prompt_ms in the engine,
receive_us, prepare_us and transport_us around it (deployments/api/timings.py); the rest of TTFT lies before and behind, in
HAProxy and the client. Written to benchmarks/results/<device>/serving.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.report import p99, write_report
from benchmarks.server import ROOT, connect, serving

_TEXT = "the sea is wide and a small boat goes out in the early morning to look for fish near old stones"
_EVENT = b'data: {"'  # what begins each, and is nowhere else: quotes in a text are escaped
CONNECT_S = 0.5  # for the processes of the clients, before they ask


@dataclass
class Timeline:
    """One stream: when it was asked for and when each event with text came, in seconds of time.perf_counter(); and what the
    server says of it."""

    asked: float
    events: list[float]
    tokens: int
    timings: dict[str, Any]


class Stream(asyncio.Protocol):
    """One request: asked when `ask` is called; its events come in."""

    def __init__(self, prompt_words: int, tokens: int, number: int, done: asyncio.Future[None]) -> None:
        text = _TEXT.split()
        words = [text[(number * 7 + place * (place + number)) % len(text)] for place in range(prompt_words)]
        body = json.dumps({
            "prompt": f"{number} " + " ".join(words), "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True}, "timings": True,
        }).encode()  # fmt: skip
        self._request = (b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
                         b"content-length: %d\r\nconnection: close\r\n\r\n%b" % (len(body), body))  # fmt: skip
        self._asked = 0.0
        self._number, self._tokens, self._done = number, tokens, done
        self._events: list[float] = []
        self._received = bytearray()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def ask(self) -> None:
        self._asked = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        seen = max(0, len(self._received) - len(_EVENT) + 1)  # the rest may be the begin of a mark
        self._received += data
        self._events += [time.perf_counter()] * self._received.count(_EVENT, seen)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._done.done():
            self._done.set_result(None)

    def timeline(self) -> Timeline:
        """Of a stream that has ended. Raises RuntimeError if it did not as it should."""
        last = self._received.rfind(_EVENT)
        told = json.loads(self._received[last + 6 :].split(b"\n", 1)[0]) if last >= 0 else {}
        found = told.get("usage", {}).get("completion_tokens", 0)
        if not self._received.startswith(b"HTTP/1.1 200 ") or found != self._tokens:
            end = bytes(self._received[-2000:])
            raise RuntimeError(f"stream {self._number} ended after {found} of {self._tokens} tokens: {end!r}")
        return Timeline(self._asked, self._events[:-1], found, told["timings"])


def run_client(port: int, numbers: list[int], prompt_words: int, tokens: int, begin: float) -> list[Timeline]:
    """A process' share of the streams, all asked for at `begin`, of time.perf_counter(), which processes have in common."""

    async def everyone() -> list[Timeline]:
        loop = asyncio.get_running_loop()
        dones = [loop.create_future() for _ in numbers]
        streams = [Stream(prompt_words, tokens, number, done) for number, done in zip(numbers, dones, strict=True)]
        for stream in streams:
            await connect(stream, port)
        late = time.perf_counter() - begin
        if late > 0:
            raise RuntimeError(f"connecting took {late:.2f} s too long")
        await asyncio.sleep(-late)
        for stream in streams:
            stream.ask()
        await asyncio.gather(*dones)
        return [stream.timeline() for stream in streams]

    return uvloop.run(everyone())


def one_round(clients: ProcessPoolExecutor, port: int, shares: list[list[int]], words: int, tokens: int) -> list[Timeline]:
    """shares: of each process, the numbers of its streams."""
    begin = time.perf_counter() + CONNECT_S
    jobs = [clients.submit(run_client, port, share, words, tokens, begin) for share in shares]
    return [line for job in jobs for line in job.result()]


def summarise(rounds: list[list[Timeline]]) -> dict[str, Any]:
    """Times in milliseconds; a stream's events arrive one per token unless the reader is behind."""
    timelines = [line for lines in rounds for line in lines]
    ttft = [1e3 * (line.events[0] - line.asked) for line in timelines]
    itl = [1e3 * (b - a) for line in timelines for a, b in zip(line.events, line.events[1:], strict=False)]
    seconds = sum(max(line.events[-1] for line in lines) - min(line.asked for line in lines) for lines in rounds)
    told = [{**line.timings, **line.timings["hops_us"]} for line in timelines]
    middle = {name: statistics.median(one[name] for one in told)
              for name in ("prompt_n", "queue_ms", "prompt_ms", "receive", "prepare", "transport")}  # fmt: skip
    return {
        "streams": len(rounds[0]), "samples": len(timelines), "prompt_tokens": round(middle["prompt_n"]),
        "tokens_per_second": round(sum(line.tokens for line in timelines) / seconds, 1),
        "ttft_ms_p50": round(statistics.median(ttft), 2), "ttft_ms_p99": round(p99(ttft), 2),
        "itl_ms_p50": round(statistics.median(itl), 2), "itl_ms_p99": round(p99(itl), 2),
        "queue_ms": round(middle["queue_ms"], 2), "prompt_ms": round(middle["prompt_ms"], 2),
        **{f"{hop}_us": round(middle[hop]) for hop in ("receive", "prepare", "transport")},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "weight" / "SmolLM2-135M-Instruct")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=100, help="words of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each stream")
    parser.add_argument("--samples", type=int, default=32, help="streams that are counted, at least")
    parser.add_argument("--rounds", type=int, default=5, help="that are counted, at least")
    parser.add_argument("--clients", type=int, default=max(1, (os.cpu_count() or 1) // 4), help="processes of the clients")
    parser.add_argument("--api-replicas", default="auto", help="as in serve_config.yaml")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    with serving({"model": str(options.model.resolve()), "api_replicas": options.api_replicas}) as server:
        ready_s = time.time() - server.started
        facts = json.loads(server.get("/v1/models")[1])["data"][0]
        print(f"{facts['id']} ready {ready_s:.1f} s after the command", file=sys.stderr)
        server.wait_captured()
        captured_s = time.time() - server.started
        with ProcessPoolExecutor(options.clients, get_context("spawn")) as clients:
            list(clients.map(time.sleep, [CONNECT_S] * options.clients))  # until all have been started
            for place, streams in enumerate(options.streams):
                rounds = []
                for number in range(1 + max(options.rounds, -(-options.samples // streams))):
                    offset = 10_000_000 * place + 10_000 * number  # other prompts: no prefix hits
                    shares = [[*range(offset + first, offset + streams, options.clients)]
                              for first in range(min(options.clients, streams))]  # fmt: skip
                    rounds.append(one_round(clients, server.port, shares, options.prompt, options.tokens))
                rows.append({"model": facts["id"], "dtype": facts["meta"]["dtype"], "prompt_words": options.prompt,
                             "new_tokens": options.tokens, "ready_s": round(ready_s, 1), "clients": options.clients,
                             "captured_s": round(captured_s, 1), **summarise(rounds[1:])})  # fmt: skip
                print(rows[-1], file=sys.stderr)
    print("streams   tok/s   TTFT p50/p99 ms   ITL p50/p99 ms")
    for row in rows:
        print("{streams:7}{tokens_per_second:8.0f}{ttft_ms_p50:9.1f} /{ttft_ms_p99:7.1f}{itl_ms_p50:8.2f} /{itl_ms_p99:7.2f}"
              .format(**row))  # fmt: skip
    print(write_report("serving", rows, out=options.out))


if __name__ == "__main__":
    main()
