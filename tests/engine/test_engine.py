"""The whole engine against transformers: every family, and every way in which the same tokens may be cut up, cached,
preempted or mixed; then what happens to a request, and to its neighbours, when something goes wrong."""

from __future__ import annotations

import logging
import math
import threading
import time
from dataclasses import replace

import pytest
import torch

from model_core.engine.config import EngineConfig
from model_core.engine.engine import Engine
from model_core.engine.request import EngineStats, Request, SamplingParams
from model_core.errors import EngineDead, RequestError
from model_core.weights.checkpoint import open_checkpoint
from tests.engine.served import Served

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE, VOCAB, NEW, EOS = 8, 300, 24, 2
EPS = torch.finfo(torch.float32).eps


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [ids(1, 1), ids(8, 2), ids(17, 3), ids(45, 4)]


class Gated(Served):
    """Steps wait while requests are submitted, so who meets whom is not luck."""

    def __init__(self, engine: Engine) -> None:
        self.go, self.at_gate = threading.Event(), threading.Event()
        launch = engine.parts.runner.launch

        def gated(plan, *rest):
            self.at_gate.set()
            assert self.go.wait(60)
            return launch(plan, *rest)

        engine.parts.runner.launch = gated
        engine.parts.runner.kv.poison(1e30)
        super().__init__(engine)

    def until(self, true) -> None:
        """Let steps run until then."""
        self.go.set()
        super().until(true)
        self.go.clear()

    def steps(self, count: int) -> None:
        """Let at least `count` more steps run."""
        before = self.engine.stats().steps
        self.go.set()
        while self.engine.alive and self.engine.stats().steps < before + count:
            time.sleep(0.0005)
        self.go.clear()

    def error(self, name: str) -> str:
        return self.events[name][-1].error or ""

    def close(self) -> EngineStats:
        self.go.set()
        return super().close()


@pytest.fixture
def serve(checkpoint_dirs, oracles):
    """serve(family, pages=, **EngineConfig): a running engine whose unwritten KV slots are all 1e30."""
    opened = []

    def open_(family: str = "llama3", *, pages: int = 100, before=lambda engine: None, **config) -> Gated:
        folder = checkpoint_dirs[family]
        kv = open_checkpoint(folder).config.kv_bytes_per_token(4) * PAGE * pages
        config = dict(max_seqs=8, max_batch_tokens=128) | config
        engine = Engine.load(folder, EngineConfig(device="cpu", dtype="float32", threads=1, page_size=PAGE,
                                                  kv_cache_bytes=kv, **config))  # fmt: skip
        before(engine)
        opened.append(Gated(engine))
        return opened[-1]

    yield open_
    for served in opened:
        served.close()


@pytest.fixture(scope="session")
def greedy(oracles):
    """greedy(family, prompt, **GenerationConfig): what transformers adds to the prompt."""
    known = {}

    def continued(family: str, prompt: list[int], **options) -> list[int]:
        key = (family, *prompt, *options.items())
        if key not in known:
            options = dict(max_new_tokens=NEW, eos_token_id=None) | options
            with torch.no_grad():
                found = oracles[family].generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)),
                                                 do_sample=False, pad_token_id=0, **options)  # fmt: skip
            known[key] = found[0, len(prompt) :].tolist()
        return known[key]

    return continued


def request(name: str, prompt: list[int], **params) -> Request:
    return Request(name, prompt, SamplingParams(**(dict(max_tokens=NEW, temperature=0.0, ignore_eos=True) | params)))


def everyone(**params) -> list[Request]:
    return [request(f"r{index}", prompt, **params) for index, prompt in enumerate(PROMPTS)]


# ---- the same tokens, whatever happens on the way ----------------------------------------------------------------------


def test_a_prompt_fed_whole(serve, greedy, family):
    served = serve(family)
    for one in everyone():
        assert served.ask(one) == {one.request_id: greedy(family, one.prompt_ids)}
    assert [record.prefill_tokens for record in served.engine.records.last(4 * NEW) if record.prefill_tokens] == [1, 8, 17, 45]


def test_a_prompt_fed_in_chunks(serve, greedy, family):
    served = serve(family, max_seqs=7, max_batch_tokens=7)
    for one in everyone():
        assert served.ask(one) == {one.request_id: greedy(family, one.prompt_ids)}
    chunks = [record.prefill_tokens for record in served.engine.records.last(1000) if record.prefill_tokens]
    assert chunks == [1, 7, 7, 7, 3, 7, 7, 7, 7, 7, 7, 3]  # the last token of 8 is one like any decode


def test_batched_with_others(serve, greedy, family):
    """Chunks and decodes mixed: a budget that one long prompt fills."""
    served = serve(family, max_batch_tokens=20)
    assert served.ask(*everyone()) == {one.request_id: greedy(family, one.prompt_ids) for one in everyone()}
    records = served.engine.records.last(1000)
    assert max(record.decodes for record in records) == 4 and any(r.decodes and r.prefill_tokens for r in records)


def test_after_preemption(serve, greedy, family):
    """14 pages for sequences that hold 1, 1, 3 and 6 at first, and 3, 4, 5 and 9 in the end."""
    served = serve(family, pages=15)
    assert served.ask(*everyone()) == {one.request_id: greedy(family, one.prompt_ids) for one in everyone()}
    assert served.engine.stats().preemptions > 0


def test_through_a_prefix_hit(serve, greedy, family):
    """The same prompt again, then one that begins with prompt and answer, as the next turn of a conversation does."""
    served, prompt = serve(family, max_batch_tokens=16), PROMPTS[3]
    answer = greedy(family, prompt)
    assert served.ask(request("a", prompt)) == {"a": answer}
    assert served.ask(request("b", prompt)) == {"b": answer}
    turn = prompt + answer + ids(5, 9)
    assert served.ask(request("c", turn)) == {"c": greedy(family, turn)}
    cached = {name: [event.cached_tokens for event in served.events[name]] for name in "abc"}
    assert cached == {"a": [0] * NEW, "b": [40, *[0] * (NEW - 1)], "c": [64, *[0] * (NEW - 1)]}
    assert served.engine.stats().prefix_hits == 104


def test_the_first_event_tells_how_long_it_took(serve):
    """One slot, so that the second request waits for all of the first; a prompt of 2 steps, the second of one token."""
    served = serve(max_seqs=1, max_batch_tokens=len(PROMPTS[3]) - 1)
    begun = time.perf_counter()
    served.ask(request("a", PROMPTS[3]), request("b", PROMPTS[3]))
    spent = time.perf_counter() - begun
    for name in "ab":
        first, *others = served.events[name]
        assert first.waits is not None and all(event.waits is None for event in others)
        assert first.waits[0] >= 0 < first.waits[1] and sum(first.waits) < spent
    assert served.events["b"][0].waits[0] > served.events["a"][0].waits[1]
    stats = served.engine.stats()
    assert sum(stats.step_tokens) == stats.steps and stats.step_tokens[0] >= 2 * (NEW - 1)
    assert stats.computed_tokens == stats.prompt_tokens - stats.prefix_hits + stats.generation_tokens - 2


def test_prefix_cache_can_be_off(serve, greedy):
    served, prompt = serve(prefix_cache=False), PROMPTS[3]
    served.ask(request("a", prompt))
    assert served.ask(request("b", prompt)) == {"b": greedy("llama3", prompt)}
    assert served.events["b"][0].cached_tokens == served.engine.stats().pages_cached == 0


SAMPLED = dict(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, seed=11, repetition_penalty=1.1, frequency_penalty=0.2,
               presence_penalty=0.1, logit_bias={5: 1.5, 17: -2.0})  # fmt: skip


@pytest.mark.parametrize("family", ["llama2", "mistral", "qwen3"])
def test_seeded_sampling_does_not_depend_on_the_way(serve, greedy, family):
    """Alone, in chunks, preempted (token counts are rebuilt), and among others who ask for other things."""
    others = [dict(), dict(temperature=1.5, seed=3), dict(temperature=0.7, top_k=2, logprobs=5), dict(presence_penalty=2.0)]
    mates = [request(f"m{index}", ids(20 + index, 30 + index), **params) for index, params in enumerate(others)]

    def run(company=(), **config):
        served = serve(family, **config)
        found = served.ask(*everyone(**SAMPLED), *company)
        return {one.request_id: found[one.request_id] for one in everyone()}, served.engine.stats()

    alone = serve(family)
    wanted = {name: tokens for one in everyone(**SAMPLED) for name, tokens in alone.ask(one).items()}
    assert run()[0] == wanted
    assert run(max_seqs=4, max_batch_tokens=5)[0] == wanted
    assert run(mates, max_batch_tokens=30)[0] == wanted
    tokens, stats = run(pages=15)
    assert tokens == wanted and stats.preemptions > 0
    assert all(wanted[one.request_id] != greedy(family, one.prompt_ids) for one in everyone())


def test_a_seed_is_drawn_where_none_is_given(serve):
    """From the engine's own, in order of arrival: twins differ, a restarted engine repeats itself."""
    twins = [request(name, PROMPTS[2], temperature=1.0) for name in "ab"]
    first, again, other = (serve(seed=seed).ask(*twins) for seed in (5, 5, 6))
    assert first == again and first["a"] != first["b"] and first != other


# ---- one request ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen2"])
def test_logprobs_are_those_of_the_oracle(serve, oracles, family):
    """Raw: before bias, penalties and temperature. The sampled token's, and the best ones, best first."""
    served, prompt = serve(family, max_batch_tokens=16), PROMPTS[3]
    served.ask(request("a", prompt, **(SAMPLED | dict(logprobs=4))), request("b", prompt, logprobs=0), request("c", prompt))
    for name, count in (("a", 4), ("b", 0)):
        tokens = served.tokens(name)
        with torch.no_grad():
            logits = oracles[family](torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
        wanted, bound = torch.log_softmax(logits, -1), 128 * EPS * logits.abs().max().item()
        found = [one for event in served.events[name] for one in event.logprobs]
        assert [one.logprob for one in found] == pytest.approx(wanted.gather(1, torch.tensor(tokens)[:, None])[:, 0], abs=bound)
        for row, one in zip(wanted, found, strict=True):
            assert [pair[1] for pair in one.top] == pytest.approx(row.topk(count).values, abs=bound)
            assert [row[pair[0]] for pair in one.top] == pytest.approx(row.topk(count).values, abs=bound)
            assert len({pair[0] for pair in one.top}) == count
    assert all(event.logprobs is None for event in served.events["c"])


def test_a_stop_id_ends_a_sequence_and_is_part_of_it(serve, greedy):
    tokens, served = greedy("llama3", PROMPTS[2]), serve()
    stop = tokens[7]
    assert served.ask(request("a", PROMPTS[2], stop_ids=(stop,)))["a"] == tokens[: tokens.index(stop) + 1]
    assert served.finish("a") == "stop"


def test_no_stop_id_before_min_tokens(serve, greedy):
    """transformers forbids them the same way; stop ids of batch mates are their own business."""
    served, stop = serve(), greedy("llama3", PROMPTS[2])[3]
    wanted = greedy("llama3", PROMPTS[2], min_new_tokens=10, eos_token_id=stop)
    found = served.ask(request("a", PROMPTS[2], min_tokens=10, stop_ids=(stop,)), *everyone())
    assert found["a"] == wanted and stop not in wanted[:10]
    assert found["r2"] == greedy("llama3", PROMPTS[2])


def test_the_models_eos_ends_a_sequence_unless_ignored(serve):
    """A bias makes it the likeliest token. It also counts from min_tokens on only."""
    served, eager = serve(), dict(logit_bias={EOS: 100.0})
    assert served.engine.info.eos_ids == (EOS,)
    found = served.ask(request("a", PROMPTS[2], ignore_eos=False, **eager), request("b", PROMPTS[2], **eager),
                       request("c", PROMPTS[2], ignore_eos=False, min_tokens=5, **eager))  # fmt: skip
    assert found["a"] == [EOS] and found["b"] == [EOS] * NEW
    assert len(found["c"]) == 6 and found["c"].index(EOS) == 5
    assert [served.finish(name) for name in "abc"] == ["stop", "length", "stop"]


def test_the_longest_request_that_fits_is_served_to_its_end(serve, greedy):
    """Prompt and answer fill the context exactly; one token more is refused with the numbers."""
    served = serve()
    assert served.ask(request("a", PROMPTS[3], max_tokens=83))["a"] == greedy("llama3", PROMPTS[3], max_new_tokens=83)
    with pytest.raises(RequestError, match=r"45 tokens\) \+ max_tokens \(84\) is 129, the context holds 128.*at most 83"):
        served.submit(request("b", PROMPTS[3], max_tokens=84))


def test_totals(serve):
    served = serve(pages=15)
    served.ask(*everyone())
    stats, records = served.engine.stats(), served.engine.records.last(10_000)
    assert (stats.prompt_tokens, stats.generation_tokens) == (71, 4 * NEW)
    assert stats.steps == len(records) and [record.step for record in records] == list(range(len(records)))
    assert sum(record.preempted for record in records) == stats.preemptions > 0
    assert (stats.running, stats.waiting, stats.last_step_age_s) == (0, 0, 0.0)


# ---- going wrong ------------------------------------------------------------------------------------------------------


def test_an_abort_frees_slot_and_pages(serve, greedy):
    """Of a running one, a queued one and none at all; the others get their tokens."""
    served = serve(max_seqs=2)
    served.submit(request("a", PROMPTS[3], max_tokens=80), request("b", PROMPTS[2]), request("queued", PROMPTS[1]))
    served.steps(4)
    running = served.engine.stats()
    for name in ("a", "queued", "nobody"):
        served.engine.abort(name)
    served.wait("a", "b", "queued")
    assert [served.finish(name) for name in ("a", "b", "queued")] == ["abort", "length", "abort"]
    assert 3 <= len(served.tokens("a")) < 80 and served.tokens("queued") == [] and "nobody" not in served.events
    assert served.tokens("b") == greedy("llama3", PROMPTS[2])
    after = served.engine.stats()
    assert running.running == 2 and running.waiting == 1 and (after.running, after.waiting) == (0, 0)
    assert running.pages_free + running.pages_cached < after.pages_free + after.pages_cached == after.pages_total
    assert served.ask(request("queued", PROMPTS[1])) == {"queued": greedy("llama3", PROMPTS[1])}


BAD = {
    "temperature": [dict(temperature=-0.1), dict(temperature=math.nan), dict(temperature=101)],
    "top_p": [dict(top_p=1.1), dict(top_p=-0.1)],
    "min_p": [dict(min_p=2)],
    "repetition_penalty": [dict(repetition_penalty=0), dict(repetition_penalty=math.inf)],
    "presence_penalty": [dict(presence_penalty=2.1)],
    "frequency_penalty": [dict(frequency_penalty=-2.1)],
    "logit_bias": [dict(logit_bias={VOCAB: 1.0}), dict(logit_bias={1: math.nan}), dict(logit_bias={1: 101.0})],
    "logprobs": [dict(logprobs=-1), dict(logprobs=101)],
    "seed": [dict(seed=1 << 63)],
    "stop_token_ids": [dict(stop_ids=(-1,)), dict(stop_ids=(1,) * 257)],
    "min_tokens": [dict(min_tokens=-1), dict(min_tokens=NEW + 1)],
    "max_tokens": [dict(max_tokens=0), dict(max_tokens=500)],
}  # fmt: skip


def test_bad_values_are_refused_without_hurting_others(serve, greedy):
    served = serve()
    served.submit(*everyone())
    for field, values in BAD.items():
        for params in values:
            with pytest.raises(RequestError) as caught:
                served.submit(request("bad", PROMPTS[0], **params))
            assert caught.value.param == field, params
    for prompt in ([], [VOCAB], [-1], [1 << 40], ids(128, 1)):
        with pytest.raises(RequestError) as caught:
            served.submit(request("bad", prompt))
        assert caught.value.param == "prompt"
    with pytest.raises(RequestError, match="half a surrogate pair"):
        served.submit(replace(request("bad", PROMPTS[0]), cache_salt="\ud800"))
    served.wait(*(one.request_id for one in everyone()))
    assert all(served.tokens(one.request_id) == greedy("llama3", one.prompt_ids) for one in everyone())
    assert "bad" not in served.events


def test_a_live_request_id_is_refused_a_second_time(serve, greedy):
    served = serve()
    served.submit(request("busy", PROMPTS[0]))
    served.steps(1)
    with pytest.raises(RequestError, match="unique") as caught:
        served.submit(request("busy", PROMPTS[1]))
    assert (caught.value.param, caught.value.code) == ("request_id", "duplicate_request_id")
    served.wait("busy")
    assert served.tokens("busy") == greedy("llama3", PROMPTS[0])


def test_two_requests_of_one_id_at_the_same_moment_give_one_answer(serve, greedy, caplog):
    """Both pass the border before the engine has looked at either."""
    served = serve()
    served.submit(request("busy", PROMPTS[0]))
    assert served.at_gate.wait(20)
    served.submit(request("twin", PROMPTS[2]), request("twin", PROMPTS[3]))
    with caplog.at_level(logging.WARNING, "mini_llm.engine"):
        served.wait("busy", "twin")
    assert served.tokens("twin") == greedy("llama3", PROMPTS[2]) and "in use" in caplog.text
    assert served.ask(request("twin", PROMPTS[3])) == {"twin": greedy("llama3", PROMPTS[3])}  # it is free again


def fail_steps(served: Gated, monkeypatch, failing) -> None:
    """Steps for which failing(plan) is true raise."""
    launch = served.engine.parts.runner.launch

    def broken(plan, *rest):
        flight = launch(plan, *rest)
        if failing(plan):
            raise RuntimeError("a kernel broke")
        return flight

    monkeypatch.setattr(served.engine.parts.runner, "launch", broken)


def test_a_step_that_raises_ends_its_own_sequences_only(serve, greedy, monkeypatch):
    """Two slots: the third and fourth wait while the first two fail, and then run on the pages these left."""
    served = serve(max_seqs=2, pages=20)
    fail_steps(served, monkeypatch, lambda plan: plan.step == 5)
    served.ask(*everyone())
    assert [served.finish(f"r{index}") for index in range(4)] == ["error", "error", "length", "length"]
    assert all("a kernel broke" in served.error(f"r{index}") and len(served.tokens(f"r{index}")) >= 4 for index in (0, 1))
    assert all(served.tokens(f"r{index}") == greedy("llama3", PROMPTS[index]) for index in (2, 3))
    assert served.engine.alive
    assert served.ask(request("again", PROMPTS[1])) == {"again": greedy("llama3", PROMPTS[1])}


def test_an_engine_that_fails_again_and_again_gives_up(serve, monkeypatch, caplog):
    served = serve(max_seqs=1)
    fail_steps(served, monkeypatch, lambda plan: True)
    served.ask(*everyone())
    assert [served.finish(one.request_id) for one in everyone()] == ["error"] * 4
    assert "engine: RuntimeError: a kernel broke" in served.error("r3")
    served.engine.shutdown()
    assert not served.engine.alive and "a kernel broke" in served.engine.failure
    with pytest.raises(EngineDead, match="a kernel broke"):
        served.submit(request("late", PROMPTS[0]))


def test_logits_that_are_no_numbers_end_one_request(serve, greedy):
    """A token whose embedding is NaN; its batch mates, and who gets its pages next, never notice."""
    prompts = [[token for token in prompt if token != 299] for prompt in PROMPTS]
    served = serve(pages=14, prefix_cache=False, before=lambda engine: engine.parts.runner.model.embed[299].fill_(math.nan))
    mates = [request(f"r{index}", prompt) for index, prompt in enumerate(prompts[:3])]
    served.ask(request("nan", [299, *prompts[3]], temperature=1.0, top_p=0.9, logprobs=2), *mates)
    assert served.finish("nan") == "error" and served.tokens("nan") == [] and "not finite" in served.error("nan")
    for index in range(3):
        assert served.tokens(f"r{index}") == greedy("llama3", prompts[index])
    assert served.ask(request("next", prompts[3])) == {"next": greedy("llama3", prompts[3])}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("where", ["schedule", "on_step"])
def test_the_death_of_the_thread_is_noticed(serve, monkeypatch, caplog, where):
    served = serve()
    assert served.engine.alive
    served.submit(*everyone())
    if where == "schedule":
        monkeypatch.setattr(served.engine.parts.scheduler, "schedule", lambda: 1 / 0)
        served.wait(*(one.request_id for one in everyone()))
        assert all(served.finish(one.request_id) == "error" for one in everyone())
        assert "engine: ZeroDivisionError" in served.error("r0")
    else:
        monkeypatch.setattr(served, "events", None)  # the next report raises
        served.go.set()
    served.engine._thread.join(20)
    assert not served.engine.alive and served.engine.failure
    with pytest.raises(EngineDead, match="not running"):
        served.engine.submit(request("late", PROMPTS[0]))
    monkeypatch.undo()


def test_shutdown_ends_what_is_live(serve):
    served = serve(max_seqs=1)
    served.submit(*everyone(max_tokens=80))
    served.steps(3)
    stopper = threading.Thread(target=served.engine.shutdown)
    stopper.start()
    served.wait(*(one.request_id for one in everyone()))
    stopper.join(20)
    assert [served.finish(one.request_id) for one in everyone()] == ["abort"] * 4
    assert not served.engine.alive and len(served.tokens("r0")) >= 3
    with pytest.raises(EngineDead, match="stopped"):
        served.submit(request("late", PROMPTS[0]))


def test_a_step_that_nobody_waits_for_any_more_is_cut_short(serve, greedy, monkeypatch):
    """Aborts that come while a step is computed free its pages at the next layer; with one sequence left it goes on."""
    served = serve("llama3", prefix_cache=False)
    model, pool = served.engine.parts.runner.model, served.engine.parts.scheduler.pool
    forward, layers = model.hidden_states, []

    def slow(batch, kv, proceed):
        def at_layer():
            layers.append(len(batch.query_lens))
            if layers[-2:] == [2, 2]:  # the second layer of the first step of two
                served.engine.abort("gone")
                served.engine.abort("gone too")
            proceed()

        return forward(batch, kv, proceed=at_layer)

    monkeypatch.setattr(model, "hidden_states", slow)
    served.submit(request("gone", PROMPTS[1]), request("gone too", PROMPTS[2]))
    served.wait("gone", "gone too")
    assert layers.count(2) == 2 and layers[-2:] == [2, 2], "the third layer was not computed"
    assert {served.finish(name) for name in ("gone", "gone too")} == {"abort"}
    assert pool.used == 0 and served.engine.parts.scheduler.in_flight == 0
    monkeypatch.undo()
    assert served.ask(request("next", PROMPTS[1])) == {"next": greedy("llama3", PROMPTS[1])}
