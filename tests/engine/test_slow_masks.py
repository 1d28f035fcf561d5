"""Masks that take long: who needs one sits steps out, keeps its tokens, and nobody else waits for it."""

from __future__ import annotations

import gc
import threading
import time
from itertools import count

import pytest

from model_core.engine.clock import MOST_AHEAD
from model_core.engine.config import EngineConfig
from model_core.engine.engine import Engine
from model_core.engine.llm import LLM
from model_core.engine.request import Request, SamplingParams
from model_core.engine.sequence import Reason
from model_core.grammar import beside
from model_core.grammar.spec import of_regex, of_schema
from tests.engine.served import Served

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = EngineConfig(device="cpu", dtype="float32", threads=1, max_seqs=4, kv_cache_bytes=2 << 20)
FAR = of_regex("[a-z]{1000}", "structured_outputs.regex")
LONG = of_schema({"type": "string", "minLength": 700}, "response_format")
NEAR = of_regex(r"\d{3}-\d{4}", "structured_outputs.regex")
MANY = [
    SamplingParams(max_tokens=40, temperature=0.0, grammar=FAR),
    SamplingParams(max_tokens=40, temperature=1.0, seed=5, grammar=LONG, frequency_penalty=1.5, repetition_penalty=1.3),
    SamplingParams(max_tokens=40, temperature=1.0, seed=6, grammar=FAR, logprobs=2, presence_penalty=2.0),
    SamplingParams(max_tokens=40, temperature=1.0, seed=7, ignore_eos=True),
    SamplingParams(max_tokens=40, temperature=1.0, seed=8, grammar=NEAR),
    SamplingParams(max_tokens=1, temperature=1.0, seed=9, grammar=LONG),
]


@pytest.fixture(scope="module")
def folder(tiny_with_end):
    return tiny_with_end


@pytest.fixture(scope="module")
def expected(folder):
    """Nobody sits out."""
    with pytest.MonkeyPatch.context() as patched, LLM.load(folder, CONFIG) as llm:
        patched.setattr(beside, "WAIT_S", 60.0)
        return ask(llm)


@pytest.fixture
def slow(monkeypatch):
    """Set how long a mask takes, in seconds, by its number."""

    def set_to(seconds) -> None:
        inner, number = beside._filled, count()

        def filled(*args):
            time.sleep(seconds(next(number)))
            return inner(*args)

        monkeypatch.setattr(beside, "_filled", filled)

    return set_to


def ask(llm: LLM) -> list:
    found = llm.generate([f"prompt {i}" for i in range(len(MANY))], MANY)
    return [(one.token_ids, one.finish, one.logprobs and [step.logprob for step in one.logprobs]) for one in found]


@pytest.mark.parametrize("preempting", [False, True], ids=["", "preempting"])
@pytest.mark.parametrize("ahead", [0, MOST_AHEAD], ids=["step by step", "ahead"])
def test_the_tokens_are_the_same(folder, expected, slow, ahead, preempting) -> None:
    slow(lambda number: 0.02 if number % 3 == 1 else 0.0)
    missed = 0
    with LLM.load(folder, CONFIG) as llm:
        llm.engine._most_ahead = ahead
        scheduler, inner = llm.engine.parts.scheduler, llm.engine._on_step

        def deliver(events) -> None:
            nonlocal missed
            inner(events)
            missed += any(reason is Reason.MASK for reason in scheduler.reasons().values())
            for event in events[:: 1 + len(events) // 2] if preempting else ():
                scheduler.preempt(event.request_id)

        llm.engine._on_step = deliver
        found = ask(llm)
        assert [one[:2] for one in found] == [one[:2] for one in expected]
        assert found[2][2] == pytest.approx(expected[2][2], rel=1e-4)
        assert missed > 10 and (scheduler.preemptions > 20) == preempting
        assert not scheduler.has_work and not scheduler.pool.used


def request(name: str, **params) -> Request:
    return Request(name, [1, 2, 3], SamplingParams(ignore_eos=True, stop_ids=(300,), **params))


@pytest.fixture
def heard(folder):
    one = Served(Engine.load(folder, CONFIG))
    yield one
    one.engine.shutdown()


def test_others_go_on_meanwhile(heard, slow) -> None:
    slow(lambda number: 0.3)
    heard.submit(request("slow", max_tokens=4, grammar=FAR))
    heard.submit(request("other", max_tokens=60))
    heard.submit(request("quick", max_tokens=8, grammar=NEAR, logit_bias={300: -100.0}))
    heard.wait("slow", "other")
    steps = [b - a for a, b in zip(heard.times["other"], heard.times["other"][1:], strict=False)]
    assert sorted(steps)[-3] < 0.1 and heard.times["other"][-1] < heard.times["slow"][-1]
    assert heard.times["slow"][-1] - heard.times["slow"][0] > 0.85 and len(heard.times["slow"]) == 4
    assert heard.finishes() == {"slow": "length", "other": "length", "quick": "length"}


def test_an_abort_does_not_wait_for_the_mask(heard, slow) -> None:
    slow(lambda number: 0.0 if number < 3 else 1.0)
    heard.submit(request("slow", max_tokens=100, grammar=FAR))
    heard.until(lambda: len(heard.times.get("slow", [])) == 3)
    time.sleep(0.1)
    assert "waiting for a mask" in [(heard.engine.stage, time.sleep(0.002))[0] for _ in range(20)]
    began = time.perf_counter()
    heard.engine.abort("slow")
    heard.submit(request("next", max_tokens=3))
    heard.wait("slow", "next")
    assert time.perf_counter() - began < 0.5 and heard.finishes() == {"slow": "abort", "next": "length"}
    assert not heard.engine.parts.scheduler.pool.used


@pytest.mark.parametrize("alone", [True, False])
def test_a_shutdown_does_not_wait_for_the_mask(folder, slow, alone) -> None:
    slow(lambda number: 0.0 if number < 3 else 1.0)
    heard = Served(Engine.load(folder, CONFIG))
    heard.submit(request("slow", max_tokens=100, grammar=FAR))
    if not alone:
        heard.submit(request("other", max_tokens=500))
    heard.until(lambda: len(heard.times.get("slow", [])) == 3)
    began = time.perf_counter()
    heard.engine.shutdown()
    assert time.perf_counter() - began < 0.5 and set(heard.finishes().values()) == {"abort"} and not heard.engine.failure
    heard.engine = None
    gc.collect()
    time.sleep(1.2)
    assert not any(thread.name.startswith("mask_") for thread in threading.enumerate())


def test_a_mask_that_fails_ends_one_request_alone(heard, monkeypatch) -> None:
    inner, number = beside._filled, count()

    def filled(*args):
        if next(number) == 2:
            raise RuntimeError("out of order")
        return inner(*args)

    monkeypatch.setattr(beside, "_filled", filled)
    heard.submit(request("slow", max_tokens=100, grammar=FAR))
    heard.submit(request("other", max_tokens=20))
    heard.wait("slow", "other")
    assert heard.finishes() == {"slow": "error", "other": "length"} and len(heard.times["slow"]) == 3
