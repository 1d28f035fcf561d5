"""Several steps in flight: the same tokens as step by step, nothing of a sequence's overrun is seen, and nothing leaks."""

from __future__ import annotations

import threading
from statistics import median
from types import SimpleNamespace

import pytest
import torch

from benchmarks.random_model import write_model
from model_core.engine.clock import MOST_AHEAD, Clock
from model_core.engine.config import EngineConfig
from model_core.engine.engine import Engine
from model_core.engine.records import StepRecord
from model_core.engine.request import Request, SamplingParams

GPU = torch.cuda.is_available()
NEW = 30
PROMPTS = [[(7 * place * place + 31 * row + place) % 500 for place in range(length)] for row, length in enumerate([1, 17, 40])]
PAGE = 16 * 2 * 2 * 2 * 16 * 4  # bytes: tokens, K and V, layers, heads, size of a head, float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model("tiny", tmp_path_factory.mktemp("model") / "tiny", dtype=torch.float32)


def ask(name: str, row: int, **params) -> Request:
    params = dict(max_tokens=NEW, temperature=0.8, seed=row, ignore_eos=True) | params
    return Request(name, PROMPTS[row], SamplingParams(**params))


def everyone(**params) -> list[Request]:
    return [ask(f"r{row}", row, **params) for row in range(3)]


def run(folder, requests, ahead, *, at=None, late=(), pages=64, poison=None, **config):
    """Tokens and finish by request, and the most steps that were in flight when one was launched. at: (request, number of
    tokens, what to do then); late: requests that are submitted by it; poison: a token whose embedding is no number."""
    engine = Engine.load(folder, EngineConfig(dtype="float32", kv_cache_bytes=pages * PAGE, device="cuda" if GPU else "cpu",
                                              max_seqs=4, **config))  # fmt: skip
    engine._most_ahead = ahead
    scheduler, runner = engine.parts.scheduler, engine.parts.runner
    if poison is not None:
        runner.model.embed[poison] = float("nan")
    tokens, finishes, deepest, done = {}, {}, [0], threading.Event()
    launch = runner.launch

    def watched(plan, *rest):
        deepest[0] = max(deepest[0], scheduler.in_flight - 1)
        if not GPU:
            scheduler.check()
        return launch(plan, *rest)

    runner.launch = watched

    def on_step(events):
        for event in events:
            assert event.request_id not in finishes, "an event after the last one"
            told = tokens.setdefault(event.request_id, [])
            told += event.token_ids
            if event.finish:
                finishes[event.request_id] = event.finish
            if at and at[:2] == (event.request_id, len(told)) and event.token_ids:
                at[2](engine)
        if finishes.keys() >= {request.request_id for request in (*requests, *late)}:
            done.set()

    for request in requests:  # before it starts, so that they meet in the first step
        engine._inbox.submit(engine._seeded(request), None)
    engine.start(on_step)
    assert done.wait(100), f"{engine.stage} {engine.failure}"
    engine.shutdown()
    while scheduler._plans:  # launched, and not read before the end
        plan = scheduler._plans[0]
        scheduler.commit(plan, [0] * len(plan.sampling))
    scheduler.check()
    assert scheduler.pool.used == 0 and scheduler.running == 0
    return tokens, finishes, deepest[0]


@pytest.fixture(scope="module")
def expected(folder):
    tokens, finishes, deepest = run(folder, everyone(), 0)
    assert deepest == 0 and set(finishes.values()) == {"length"} and all(len(told) == NEW for told in tokens.values())
    return tokens


@pytest.mark.parametrize("ahead", [1, 2, MOST_AHEAD])
def test_tokens_are_those_of_one_step_at_a_time(folder, expected, ahead):
    tokens, _, deepest = run(folder, everyone(), ahead)
    assert tokens == expected and (deepest == ahead or GPU)


def test_no_sequence_runs_past_its_end(folder, expected):
    """A stop id ends one while its next tokens are computed; one ends by its number of tokens in the middle of a flight."""
    stop = expected["r1"][11]
    end = expected["r1"].index(stop) + 1
    requests = [ask("r0", 0, max_tokens=7), ask("r1", 1, stop_ids=(stop,)), ask("r2", 2)]
    tokens, finishes, _ = run(folder, requests, MOST_AHEAD)
    assert tokens == {"r0": expected["r0"][:7], "r1": expected["r1"][:end], "r2": expected["r2"]}
    assert finishes == {"r0": "length", "r1": "stop", "r2": "length"}


def test_an_abort_while_steps_are_in_flight(folder, expected):
    tokens, finishes, _ = run(folder, everyone(), MOST_AHEAD, at=("r1", 5, lambda engine: engine.abort("r1")))
    assert finishes == {"r0": "length", "r1": "abort", "r2": "length"}
    assert expected["r1"][: len(tokens["r1"])] == tokens["r1"] and 5 <= len(tokens["r1"]) <= 6 + MOST_AHEAD
    assert all(tokens[name] == expected[name] for name in ("r0", "r2"))


def test_a_request_that_comes_while_steps_are_in_flight(folder, expected):
    """It is scheduled once no more than one of them is left; its slot was another's, whose overrun was dropped just before."""
    stop = expected["r1"][6]
    first, late = [ask("r0", 0), ask("r1", 1, stop_ids=(stop,))], ask("r2", 2)
    tokens, finishes, deepest = run(folder, first, MOST_AHEAD, at=("r0", 8, lambda engine: engine.submit(late)), late=[late])
    ends = expected["r1"].index(stop) + 1
    assert tokens == {"r0": expected["r0"], "r1": expected["r1"][:ends], "r2": expected["r2"]}
    assert finishes == {"r0": "length", "r1": "stop", "r2": "length"} and (deepest == MOST_AHEAD or GPU)


def test_too_few_pages(folder, expected):
    """9 pages for sequences that hold 1, 2 and 3 at first and 2, 3 and 5 in the end."""
    seen = []
    tokens, finishes, _ = run(folder, everyone(), MOST_AHEAD, pages=10,
                              at=("r0", NEW, lambda engine: seen.append(engine.stats().preemptions)))  # fmt: skip
    assert tokens == expected and seen and set(finishes.values()) == {"length"}


def test_logits_that_are_no_numbers_end_one_request_at_once(folder):
    bad = Request("bad", [1, 2, 499], SamplingParams(max_tokens=9))
    requests = [bad, ask("good", 1, max_tokens=9, logit_bias={499: -100.0})]
    tokens, finishes, _ = run(folder, requests, MOST_AHEAD, poison=499)
    assert finishes == {"bad": "error", "good": "length"} and tokens["bad"] == [] and len(tokens["good"]) == 9


def test_how_many_steps_ahead(folder):
    """Short steps cover the longest pause of the thread; whenever somebody waits, or may soon, it is one."""
    engine = Engine.load(folder, EngineConfig(dtype="float32", kv_cache_bytes=64 * PAGE, device="cpu"))
    decodes, mixed = (SimpleNamespace(flight=SimpleNamespace(plan=SimpleNamespace(chunks=chunks))) for chunks in ([], [1]))
    record = StepRecord(0, 0.0, 1, 0, 1, 0, 0, 0, 0, 0)
    engine._most_ahead = MOST_AHEAD
    found = []
    for microseconds in (100, 900, 1700, 2600, 12_000):
        engine.records.append(record._replace(gpu_us=microseconds))
        found.append(engine._lookahead([decodes]))
    assert found == [4, 4, 3, 2, 1]
    engine.records.append(record._replace(gpu_us=100))
    assert engine._lookahead([decodes, mixed]) == engine._lookahead([]) == 1
    assert engine._lookahead([mixed, decodes]) == MOST_AHEAD
    engine._inbox.submit(engine._seeded(ask("a", 0)), None)
    assert engine._lookahead([decodes]) == 1
    engine._read_inbox()
    assert engine.parts.scheduler.waiting and engine._lookahead([decodes]) == 1
    engine._most_ahead = 0
    assert engine._lookahead([decodes]) == engine._lookahead([]) == 0


def test_totals_of_busy_and_idle_time(folder):
    engine = Engine.load(folder, EngineConfig(dtype="float32", kv_cache_bytes=64 * PAGE, device="cpu"))
    record = StepRecord(0, 0.0, 1, 0, 1, 0, 0, 0, 0, 0)
    for busy, idle in ((900, 0), (1100, 500)):
        engine.records.append(record._replace(gpu_us=busy, idle_us=idle))
    assert (engine.stats().gpu_busy_s, engine.stats().gpu_idle_s) == pytest.approx((0.002, 0.0005))


def test_a_span_on_a_cpu_takes_no_time():
    clock = Clock(torch.device("cpu"))
    first, second = clock.next(), clock.next()
    for span in (first, second):
        span.begin()
        span.end()
        span.wait()
    assert first is not second and not second.over and (second.microseconds(), second.since(first)) == (0, 0)


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_spans_on_a_gpu_tell_work_from_waiting():
    """50 ms of kernels, then nothing for 20 ms: events say so, and a step that was launched in time follows at once."""
    clock, cycles = Clock(torch.device("cuda")), 50_000_000
    spans = [clock.next() for _ in range(3)]
    for number, span in enumerate(spans):
        if number == 1:
            torch.cuda.synchronize()
            threading.Event().wait(0.02)
        span.begin()
        torch.cuda._sleep(cycles)
        span.begin()  # only the first one counts
        span.end()
    spans[2].wait()
    assert all(span.over and 10_000 < span.microseconds() < 200_000 for span in spans)
    assert spans[1].since(spans[0]) >= 20_000 and spans[2].since(spans[1]) < 500


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_records_on_a_gpu(folder):
    """A captured step takes time there, and with steps in flight the device waits for no more than a turn of the host."""
    engine = Engine.load(folder, EngineConfig(dtype="bfloat16", kv_cache_bytes=64 * PAGE, device="cuda", capture_at_start=True))
    done = threading.Event()
    engine.start(lambda events: done.set() if any(event.finish for event in events) else None)
    for name in ("warm", "timed"):
        done.clear()
        engine.submit(Request(name, PROMPTS[1], SamplingParams(max_tokens=200, ignore_eos=True)))
        assert done.wait(60)
    engine.shutdown()
    steps = [record for record in engine.records.last(190) if record.decodes]
    assert len(steps) > 150 and all(record.gpu_us > 0 for record in steps)
    assert engine.stats().gpu_busy_s > 1e-6 * sum(record.gpu_us for record in steps)
    turn = median(record.schedule_us + record.launch_us + record.emit_us for record in steps)  # beyond so small a model's step
    assert median(record.idle_us for record in steps) < 50 + turn
