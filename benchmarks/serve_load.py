"""Streams through the whole application around a fake engine: tokens per second, added latency, CPU per token and process.

    python -m benchmarks.serve_load [--streams 1 16 64 200] [--transport push handle] [--rounds 3]

Everything but the engine is real: HAProxy, the HTTP API with SmolLM2's tokenizer and detokeniser, the token transport, the
model replica. The engine makes one token per stream and step, each of four letters, so that the client can tell from
an event's length how many tokens it brings. The client is a process of its own (uvloop, raw sockets); it opens all streams
at once. Figures are the medians of the rounds.

tok_s      tokens / time from the first connection to the last token: in steps of 20 ms, 200 streams are 10,000 per second
delay_ms   from the step that made a token to the arrival of its event at the client, on one clock
cpu_us     CPU time (user and system, from the scheduler's counters) per token and process, idle load subtracted;
           engine_thread is the part of engine that the fake engine itself takes
Written to benchmarks/results/<device>/serve_load.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.report import p99, write_report
from benchmarks.server import ROOT, Server, connect, serving

LETTERS = 4
_MARK = b'"content":"'
PROCESSES = {"engine": "ray::ServeReplica:llm:Model", "api": "ray::ServeReplica:llm:Api", "haproxy": ""}


class Reader(asyncio.Protocol):
    """One stream: arrivals = [(time.time(), tokens so far)]."""

    def __init__(self, seed: int, tokens: int, done: asyncio.Future[None]) -> None:
        messages = [{"role": "user", "content": f"Tell me story number {seed}."}]
        body = {"messages": messages, "stream": True, "max_tokens": tokens, "seed": seed, "ignore_eos": True}
        self._body = json.dumps(body).encode()
        self._done = done
        self._left = b""
        self._tokens = 0
        self.arrivals: list[tuple[float, int]] = []

    def connection_made(self, transport: Any) -> None:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        transport.write(head + b"content-length: %d\r\n\r\n" % len(self._body) + self._body)

    def data_received(self, data: bytes) -> None:
        now = time.time()
        data = self._left + data
        at = 0
        while (found := data.find(_MARK, at)) >= 0 and (end := data.find(b'"', found + len(_MARK))) >= 0:
            self._tokens += (end - found - len(_MARK)) // LETTERS
            at = end
        if at:
            self.arrivals.append((now, self._tokens))
        self._left = data[max(at, len(data) - 200) :] if at < len(data) else b""
        if b"[DONE]" in data and not self._done.done():
            self._done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._done.done():
            self._done.set_exception(ConnectionError(f"the stream ended after {self._tokens} tokens"))


def client(port: int, streams: int, tokens: int, results: Any) -> None:
    """A process: {"began", "cpu_s", "arrivals": by stream}."""

    async def run() -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        dones = [loop.create_future() for _ in range(streams)]
        readers = [Reader(seed, tokens, done) for seed, done in enumerate(dones)]
        began = time.time()
        await asyncio.gather(*(connect(reader, port) for reader in readers))
        await asyncio.gather(*dones)
        return {"began": began, "cpu_s": time.process_time(), "arrivals": [reader.arrivals for reader in readers]}

    results.put(uvloop.run(run()))


def cpu_seconds(pids: list[int]) -> float:
    """CPU time of all threads of the processes, by the scheduler's nanosecond counters."""
    total = 0
    for pid in pids:
        for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            total += int(path.read_text().split()[0])
    return total / 1e9


def _program(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0].rpartition("/")[2]


def find_processes(server: Server) -> dict[str, list[int]]:
    found = {name: server.pids(title) for name, title in PROCESSES.items() if title}
    found["haproxy"] = [pid for pid in server.pids() if _program(pid) == "haproxy"]
    return found


def one_round(server: Server, trace: Path, streams: int, tokens: int) -> dict[str, Any]:
    processes = find_processes(server)
    idle_began, idle_before = time.monotonic(), {name: cpu_seconds(pids) for name, pids in processes.items()}
    time.sleep(1.0)
    idle = {name: (cpu_seconds(pids) - idle_before[name]) / (time.monotonic() - idle_began) for name, pids in processes.items()}
    trace_at = trace.stat().st_size
    results = multiprocessing.get_context("spawn").Queue()
    process = multiprocessing.get_context("spawn").Process(target=client, args=(server.port, streams, tokens, results))
    process.start()
    began, before = time.monotonic(), {name: cpu_seconds(pids) for name, pids in processes.items()}
    answer = results.get(timeout=300)
    wall, after = time.monotonic() - began, {name: cpu_seconds(pids) for name, pids in processes.items()}
    process.join()
    arrivals = answer["arrivals"]
    total = sum(stream[-1][1] for stream in arrivals)
    assert total == streams * tokens, f"{total} tokens arrived of {streams * tokens}"
    with trace.open() as file:
        file.seek(trace_at)
        steps = [json.loads(line) for line in file]
    delays = travel_times(steps, arrivals)
    used = {name: 1e6 * (after[name] - before[name] - idle[name] * wall) / total for name in processes}
    return {
        "tok_s": total / (max(stream[-1][0] for stream in arrivals) - answer["began"]),
        "delay_ms_p50": 1e3 * statistics.median(delays),
        "delay_ms_p99": 1e3 * p99(delays),
        **{f"cpu_us_{name}": value for name, value in used.items()},
        "cpu_us_engine_thread": 1e6 * (steps[-1][2] - steps[0][2]) / total,
        "cpu_us_server": sum(used.values()),
        "cpu_us_client": 1e6 * answer["cpu_s"] / total,
    }


def travel_times(steps: list[Any], arrivals: list[list[tuple[float, int]]]) -> list[float]:
    """Seconds from the step that made a token to its arrival, for all tokens."""
    first = {seed: index for index, (_, begun, _) in enumerate(steps) for seed in begun}
    delays = []
    for seed, stream in enumerate(arrivals):
        token = 0
        for moment, until in stream:
            while token < until:
                delays.append(moment - steps[first[seed] + token][0])
                token += 1
    return delays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64, 200])
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--transport", nargs="+", default=["push", "handle"], choices=["push", "handle"])
    parser.add_argument("--model", type=Path, default=ROOT / "weight" / "SmolLM2-135M-Instruct", help="a tokenizer's folder")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for transport in options.transport:
        trace = Path(f"/dev/shm/mini-llm-serve-load-{time.time_ns()}")
        args = {"model": str(options.model.resolve()), "fallback": None, "step_ms": options.step_ms, "letters": LETTERS,
                "trace": str(trace), "transport": transport}  # fmt: skip
        try:
            with serving(args, import_path="benchmarks.fake_engine:build") as server:
                one_round(server, trace, 16, options.tokens)  # the first requests pay for imports and connections
                for streams in options.streams:
                    rounds = [one_round(server, trace, streams, options.tokens) for _ in range(options.rounds)]
                    row = {key: round(statistics.median(r[key] for r in rounds), 1) for key in rounds[0]}
                    rows.append({"transport": transport, "streams": streams, "tokens": options.tokens,
                                 "step_ms": options.step_ms, "rounds": options.rounds, **row})  # fmt: skip
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        finally:
            trace.unlink(missing_ok=True)
    print(write_report("serve_load", rows, out=options.out))


if __name__ == "__main__":
    main()
