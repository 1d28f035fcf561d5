"""What clients of `serve run serve_config.yaml` get: tokens/s, TTFT and ITL over HTTP at several concurrencies.

    python -m benchmarks.serving --model weight/SmolLM2-135M-Instruct --streams 1 8 32

Every stream asks for `--prompt` words and `--tokens` new tokens (greedy, end-of-sequence ignored) at the same time as the
others; the client is a process of its own on the same machine. TTFT is from sending the request, ITL between the arrivals
of two tokens of one stream. A first round of the same shape is not counted; then there are as many as give --samples streams.
Where a first token's time goes is what the server tells in `timings`, medians: queue_ms and prompt_ms in the engine,
receive_us, prepare_us and transport_us around it (deployments/api/timings.py); the rest of TTFT lies before and behind, in
HAProxy and the client. Written to benchmarks/results/<device>/serving.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.report import write_report
from benchmarks.server import ROOT, serving

_TEXT = "the sea is wide and a small boat goes out in the early morning to look for fish near old stones"


@dataclass
class Timeline:
    """One stream: when it was asked for and when each event with text came, in seconds of time.perf_counter(); and what the
    server says of it."""

    asked: float
    events: list[float]
    tokens: int
    timings: dict[str, Any]


async def one_stream(port: int, prompt_words: int, tokens: int, number: int) -> Timeline:
    text = _TEXT.split()
    words = [text[(number * 7 + place * (place + number)) % len(text)] for place in range(prompt_words)]
    body = json.dumps({
        "prompt": f"{number} " + " ".join(words), "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True}, "timings": True,
    }).encode()  # fmt: skip
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    asked = time.perf_counter()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
                 b"content-length: %d\r\nconnection: close\r\n\r\n%b" % (len(body), body))  # fmt: skip
    events, last = list[float](), dict[str, Any]()
    async for line in reader:
        if line.startswith(b"data: {"):
            if b'"error"' in line[:20]:
                raise RuntimeError(line.decode())
            if b'"choices":[]' in line:
                last = json.loads(line[6:])
            else:
                events.append(time.perf_counter())
        elif line.startswith(b"HTTP/1.1") and b" 200 " not in line:
            raise RuntimeError(f"{line!r} {await reader.read()!r}")
    writer.close()
    found = last["usage"]["completion_tokens"] if last else 0
    if found != tokens or not events:
        raise RuntimeError(f"stream {number} ended after {found} of {tokens} tokens")
    return Timeline(asked, events, found, last["timings"])


def run_client(port: int, streams: int, prompt_words: int, tokens: int, offset: int) -> list[Timeline]:
    async def everyone() -> list[Timeline]:
        return await asyncio.gather(
            *(one_stream(port, prompt_words, tokens, offset + number) for number in range(streams))
        )

    return asyncio.run(everyone())


def summarise(rounds: list[list[Timeline]]) -> dict[str, Any]:
    """Times in milliseconds; a stream's events arrive one per token unless the reader is behind."""
    timelines = [line for lines in rounds for line in lines]
    ttft = sorted(1e3 * (line.events[0] - line.asked) for line in timelines)
    itl = sorted(1e3 * (b - a) for line in timelines for a, b in zip(line.events, line.events[1:], strict=False))
    seconds = sum(max(line.events[-1] for line in lines) - min(line.asked for line in lines) for lines in rounds)
    told = [{**line.timings, **line.timings["hops_us"]} for line in timelines]
    middle = {name: statistics.median(one[name] for one in told)
              for name in ("prompt_n", "queue_ms", "prompt_ms", "receive", "prepare", "transport")}  # fmt: skip
    return {
        "streams": len(rounds[0]), "samples": len(timelines), "prompt_tokens": round(middle["prompt_n"]),
        "tokens_per_second": round(sum(line.tokens for line in timelines) / seconds, 1),
        "ttft_ms_p50": round(statistics.median(ttft), 2), "ttft_ms_p99": round(_quantile(ttft, 0.99), 2),
        "itl_ms_p50": round(statistics.median(itl), 2), "itl_ms_p99": round(_quantile(itl, 0.99), 2),
        "queue_ms": round(middle["queue_ms"], 2), "prompt_ms": round(middle["prompt_ms"], 2),
        **{f"{hop}_us": round(middle[hop]) for hop in ("receive", "prepare", "transport")},
    }  # fmt: skip


def _quantile(values: list[float], q: float) -> float:
    return values[min(len(values) - 1, int(q * len(values)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "weight" / "SmolLM2-135M-Instruct")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=100, help="words of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each stream")
    parser.add_argument("--samples", type=int, default=32, help="streams that are counted, at least")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    with serving({"model": str(options.model.resolve())}) as server:
        ready_s = time.time() - server.started
        facts = json.loads(server.get("/v1/models")[1])["data"][0]
        print(f"{facts['id']} ready {ready_s:.1f} s after the command", file=sys.stderr)
        with ProcessPoolExecutor(1, get_context("spawn")) as client:
            for place, streams in enumerate(options.streams):
                rounds = []
                for number in range(1 + -(-options.samples // streams)):
                    offset = 10_000_000 * place + 10_000 * number  # other prompts: no prefix hits
                    job = client.submit(run_client, server.port, streams, options.prompt, options.tokens, offset)
                    rounds.append(job.result())
                rows.append({"model": facts["id"], "dtype": facts["meta"]["dtype"], "prompt_words": options.prompt,
                             "new_tokens": options.tokens, "ready_s": round(ready_s, 1), **summarise(rounds[1:])})  # fmt: skip
                print(rows[-1], file=sys.stderr)
    print("streams   tok/s   TTFT p50/p99 ms   ITL p50/p99 ms")
    for row in rows:
        print("{streams:7}{tokens_per_second:8.0f}{ttft_ms_p50:9.1f} /{ttft_ms_p99:7.1f}{itl_ms_p50:8.2f} /{itl_ms_p99:7.2f}"
              .format(**row))  # fmt: skip
    print(write_report("serving", rows, out=options.out))


if __name__ == "__main__":
    main()
