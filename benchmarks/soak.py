"""Thousands of random requests, good and bad, by clients of every manner: nothing may be lost, and nothing may break.

    python -m benchmarks.soak [--requests 6000] [--seed 0] [--model FOLDER]

Everything is real: HAProxy, the HTTP API, the transport, the engine; without --model its weights are a tiny random model's, so
that answers are any bytes at all. Rounds of requests (benchmarks/traffic.py), a dozen at a time, of which some clients leave in
the middle or read slowly; then more requests for a key than it may have at a time, and a burst beyond the queue's limit; then
silence, in which no page, no slot and no request may be left, and a fixed request must be answered as before all of them. Every
answer is validated (benchmarks/judge.py, forms.py), what keys with limits got is counted (allowances.py); a 5xx is a failure,
but for the 503 of a burst and the 504 of a deadline that was asked for. Memory of the HTTP and the model replica (heap.py) is
asked after each round. Slope: least squares over all rounds after the first quarter, per 1,000 requests; that of resident
memory wants some teeth of its saw, which end when protobuf has malloc trimmed, each 3,700 requests or so; what is in use has
none. Written to benchmarks/results/<device>/soak.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.allowances import ACCESS, FEW, ONE, OPEN, POOR, Allowances
from benchmarks.ask import Ask
from benchmarks.exchange import exchange
from benchmarks.heap import Heaps
from benchmarks.judge import judge
from benchmarks.report import write_report
from benchmarks.server import Server, serving
from benchmarks.traffic import SEQUENCES, Traffic

AT_ONCE = 10
ROUND = 250  # requests between two silences
HANG_S = 180.0  # more than the last of a burst takes where others have the cores
SILENCE_S = 10.0
QUEUED = 48
MAX_BODY = 1 << 20
CONTEXT = 2048  # tokens of the tiny model, as many as its pool holds
CROWD = 6
_GAUGES = ("mini_llm:api_active_sequences", "vllm:num_requests_running", "vllm:num_requests_waiting",
           "vllm:kv_cache_usage_perc")  # fmt: skip
_CANARY = Ask("canary", "/v1/completions", b'{"prompt":"The sea is","max_tokens":16,"temperature":0,"ignore_eos":true}')


class Leak(AssertionError):
    """Something is still in use after every client has gone."""


@dataclass
class Tally:
    """What came of the requests. faults: of answers that are not as they must be, each with its request."""

    allowances: Allowances
    statuses: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    formed: Counter[str] = field(default_factory=Counter)  # outputs that had their form to the end, by kind
    faults: list[str] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return sum(self.statuses.values())

    def count(self, ask: Ask, status: str) -> None:
        self.statuses[status] += 1
        self.kinds[ask.kind] += 1


async def send(port: int, asks: list[Ask], tally: Tally, at_once: int) -> None:
    """All of the requests, so many at a time."""
    todo = iter(asks)

    async def client() -> None:
        for ask in todo:
            try:
                reply = await exchange(port, ask, HANG_S)
                tally.count(ask, "left" if reply is None else str(reply.status))
                if reply is not None:
                    tally.formed[ask.kind] += judge(ask, reply)
                    tally.allowances.count(ask, reply)
            except (AssertionError, OSError, ValueError, asyncio.TimeoutError) as error:
                what = "no answer in time" if isinstance(error, asyncio.TimeoutError) else str(error)
                tally.faults.append(f"{ask.kind} {ask.method} {ask.path} ({ask.manner}) {ask.body[:2000]!r}: {what}")

    await asyncio.gather(*(client() for _ in range(at_once)))


def gauges(server: Server) -> dict[str, float]:
    text = server.get("/metrics")[1]
    return {name: sum(map(float, re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE))) for name in _GAUGES}


def wait_silent(server: Server) -> None:
    """Raises Leak if a page, a slot or a request is still in use after SILENCE_S."""
    end = time.monotonic() + SILENCE_S
    while any((found := gauges(server)).values()):
        if time.monotonic() > end:
            raise Leak(f"in use {SILENCE_S:g} s after the last client left: {found}")
        time.sleep(0.1)


def canary(server: Server, traffic: Traffic) -> str:
    reply = asyncio.run(exchange(server.port, traffic.with_key(_CANARY), HANG_S))
    assert reply is not None and reply.status == 200, reply
    return json.loads(reply.body)["choices"][0]["text"]


def soak(
    server: Server, traffic: Traffic, requests: int, burst: tuple[int, int], heaps: Heaps | None = None
) -> tuple[Tally, list[dict[str, Any]]]:
    """What came of it, and the memory after each round. burst: sequences, more than the server takes, and tokens of each."""
    tally, samples, expected = Tally(Allowances(traffic.most_tokens)), [], canary(server, traffic)
    began = time.monotonic()
    while tally.requests < requests and not tally.faults:
        asks = [traffic.next() for _ in range(min(ROUND, requests - tally.requests))]
        asyncio.run(send(server.port, asks, tally, AT_ONCE))
        wait_silent(server)
        if traffic.keys:
            asyncio.run(send(server.port, traffic.crowd(CROWD, ONE), tally, CROWD))
        asks, before = traffic.burst(*burst), tally.statuses["503"]
        asyncio.run(send(server.port, asks, tally, len(asks)))
        wait_silent(server)
        if tally.statuses["503"] == before:
            tally.faults.append(f"a burst of {burst[0]} sequences was not refused in part")
        if (got := canary(server, traffic)) != expected:
            tally.faults.append(f"a greedy request is answered {got!r}, before all others it was {expected!r}")
        if traffic.keys:
            tally.faults += tally.allowances.faults(time.monotonic() - began, AT_ONCE)
        samples.append({"requests": tally.requests, "seconds": round(time.monotonic() - began, 1),
                        **({} if heaps is None else heaps.ask())})  # fmt: skip
        print(samples[-1], dict(sorted(tally.statuses.items())), file=sys.stderr, flush=True)
    return tally, samples


def slope(samples: list[dict[str, Any]], part: str, name: str) -> float | None:
    """Per 1,000 requests, after the first quarter of the rounds; None for too few."""
    rest = samples[len(samples) // 4 :]
    if len(rest) < 3:
        return None
    return statistics.linear_regression([one["requests"] for one in rest], [one[part][name] for one in rest]).slope * 1000


def make_traffic(server: Server, seed: int, max_body: int, max_tokens: int = 24, keys: Sequence[str] = ()) -> Traffic:
    ask = Ask("models", "/v1/models", b"", method="GET", key=keys[0] if keys else None)
    reply = asyncio.run(exchange(server.port, ask, HANG_S))
    assert reply is not None
    card = json.loads(reply.body)["data"][0]
    return Traffic(seed, model=card["id"], vocab_size=card["meta"]["vocab_size"], context=card["max_model_len"],
                   max_body=max_body, max_tokens=max_tokens, keys=keys)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="a model folder")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        slots = 16
        engine: dict[str, Any] = {"device": "cpu", "max_seqs": slots}
        if options.model is None:
            from benchmarks.random_model import write_model

            options.model = write_model("tiny", Path(folder) / "random-tiny")
            config = json.loads((options.model / "config.json").read_text())
            (options.model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": CONTEXT,
                                                                        "eos_token_id": config["vocab_size"] - 1}))
            engine["kv_cache_bytes"] = 1 << 20  # CONTEXT tokens: pages run out, sequences are preempted
        assert slots + QUEUED >= AT_ONCE * SEQUENCES  # so that only bursts are refused
        limits = {"max_queued_requests": QUEUED, "max_body_bytes": MAX_BODY}
        args = {"model": str(options.model.resolve()), "limits": limits, "engine": engine, "access": ACCESS}
        with serving(args) as server:
            began = time.monotonic()
            traffic = make_traffic(server, options.seed, MAX_BODY, keys=(OPEN, FEW, POOR))
            with closing(Heaps(server)) as heaps:
                tally, samples = soak(server, traffic, options.requests, (2 * (slots + QUEUED), 100), heaps)
                trimmed = heaps.ask(trim=True)
            seconds = time.monotonic() - began
            left = gauges(server)
            metrics = server.get("/metrics")[1]
    for fault in tally.faults:
        print("FAULT", fault, file=sys.stderr)
    statuses = tally.statuses
    row: dict[str, Any] = {
        "model": options.model.name, "requests": tally.requests, "seconds": round(seconds, 1),
        "ok": statuses["200"], "refused_4xx": sum(count for status, count in statuses.items() if status[0] == "4"),
        "left": statuses["left"], "burst_503": statuses["503"], "faults": len(tally.faults),
        "generated_tokens": round(_total(metrics, "vllm:generation_tokens_total")),
        "preemptions": round(_total(metrics, "vllm:num_preemptions_total")),
        "in_use_at_the_end": sum(left.values()),
        "no_key_401": statuses["401"], "rate_429": statuses["429"], "deadlines": statuses["408"] + statuses["504"],
        "structured_whole": tally.formed["structured"], "calls_whole": tally.formed["calls"],
        "let_in": dict(tally.allowances.let_in), "refused": dict(tally.allowances.refused),
        **{name: value for part in ("api", "model") for name, value in _memory(samples, part, trimmed[part]).items()},
        "statuses": dict(sorted(statuses.items())), "kinds": dict(sorted(tally.kinds.items())), "memory": samples,
    }  # fmt: skip
    print({name: value for name, value in row.items() if not isinstance(value, dict | list)})
    if tally.faults:
        raise SystemExit(1)
    print(write_report("soak", [row], out=options.out))


def _memory(samples: list[dict[str, Any]], part: str, trimmed: dict[str, float]) -> dict[str, float | None]:
    """Of one replica at the end, and its slopes: KiB, or objects of Python's allocator, per 1,000 requests."""
    slopes = {name: slope(samples, part, name) for name in ("resident_mib", "used_mib", "blocks")}
    kib = {name: None if value is None else round(value * 1024, 1) for name, value in slopes.items()}
    blocks = slopes["blocks"]
    return {
        f"{part}_mib": round(samples[-1][part]["resident_mib"], 1), f"{part}_trimmed_mib": round(trimmed["resident_mib"], 1),
        f"{part}_used_mib": round(samples[-1][part]["used_mib"], 1),
        f"{part}_slope_kib_per_1000": kib["resident_mib"], f"{part}_used_slope_kib_per_1000": kib["used_mib"],
        f"{part}_blocks_per_1000": None if blocks is None else round(blocks, 1),
    }  # fmt: skip


def _total(metrics: str, name: str) -> float:
    return sum(map(float, re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", metrics, re.MULTILINE)))


if __name__ == "__main__":
    main()
