"""The scheduling policy, one rule at a time."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest

from model_core.cache.pages import PagePool
from model_core.engine.request import Request, SamplingParams
from model_core.engine.scheduler import Limits, Scheduler, StepPlan
from model_core.engine.sequence import Reason, State
from model_core.errors import ConfigError, RequestError

OUT = 7  # a token that ends nothing


def make(pages=100, size=4, seqs=8, budget=64, context=1000, **kw) -> Scheduler:
    return Scheduler(PagePool(pages, size, prefix_cache=kw.pop("prefix_cache", True)),
                     Limits(seqs, budget, context), **kw)


def request(name: str, prompt: int | list[int], max_tokens: int = 10, priority: int = 0, **params) -> Request:
    ids = prompt if isinstance(prompt, list) else [100 + ord(name[0])] * prompt
    return Request(name, ids, SamplingParams(max_tokens=max_tokens, **params), priority)


def work(plan: StepPlan | None) -> list[tuple]:
    return [] if plan is None else [(e.seq.request_id, e.start, e.count, e.samples) for e in plan.entries]


def step(scheduler: Scheduler, token: int = OUT) -> list[tuple]:
    plan = scheduler.schedule()
    entries = work(plan)
    scheduler.check()
    if plan is not None:
        scheduler.commit(plan, [token] * len(plan.sampling))
        scheduler.check()
    return entries


def drain(scheduler: Scheduler, steps: int = 10_000) -> None:
    while scheduler.has_work:
        assert step(scheduler), "a live sequence and no plan"
        steps -= 1
        assert steps, "it does not end"
    assert scheduler.pool.used == 0


def test_one_request_from_prompt_to_length() -> None:
    scheduler = make()
    seq = scheduler.add(request("a", 6, max_tokens=3))
    assert (scheduler.waiting, scheduler.running) == (1, 0)
    plan = scheduler.schedule()
    assert work(plan) == [("a", 0, 6, True)] and plan.admitted == [seq] and seq.slot == 0
    assert (plan.step, plan.num_decodes, plan.num_tokens) == (0, 0, 6)
    assert scheduler.commit(plan, [OUT]) == []
    assert step(scheduler) == [("a", 6, 1, True)]
    plan = scheduler.schedule()
    assert work(plan) == [("a", 7, 1, True)] and (plan.num_decodes, plan.admitted) == (1, [])
    assert scheduler.commit(plan, [OUT]) == [seq] and seq.finish == "length" and seq.state is State.FINISHED
    assert seq.tokens[6:] == [OUT] * 3 and not scheduler.has_work and scheduler.schedule() is None
    assert (scheduler.prompt_tokens, scheduler.generation_tokens) == (6, 3)
    assert scheduler.pool.used == 0 and seq.block_table == [] and seq.slot is None


def test_decodes_go_first_and_a_long_prompt_gets_the_rest_of_the_budget() -> None:
    scheduler = make(budget=10)
    scheduler.add(request("a", 3))
    scheduler.add(request("b", 3))
    step(scheduler)
    long = scheduler.add(request("z", 25))
    assert step(scheduler) == [("a", 3, 1, True), ("b", 3, 1, True), ("z", 0, 8, False)]
    assert step(scheduler) == [("a", 4, 1, True), ("b", 4, 1, True), ("z", 8, 8, False)]
    assert long.num_output == 0
    assert step(scheduler)[2] == ("z", 16, 8, False)
    assert step(scheduler)[2] == ("z", 24, 1, True)
    assert long.num_output == 1


def test_queue_by_priority_then_arrival() -> None:
    scheduler = make(seqs=1)
    for name, priority in (("a", 0), ("b", 1), ("c", 0), ("d", -1)):
        scheduler.add(request(name, 2, max_tokens=1, priority=priority))
    order = [step(scheduler)[0][0] for _ in range(4)]
    assert order == ["d", "a", "c", "b"]


def test_nobody_passes_a_big_request_that_waits() -> None:
    scheduler = make(pages=11, seqs=4)
    scheduler.add(request("a", 16, max_tokens=20))
    step(scheduler)
    scheduler.add(request("b", 30, max_tokens=5))
    scheduler.add(request("c", 1, max_tokens=1))
    order = []
    while scheduler.has_work:
        entries = step(scheduler)
        order += [name for name, start, *_ in entries if start == 0]
        if scheduler.get("a") is not None:
            assert scheduler.reasons() == {"a": Reason.NONE, "b": Reason.NO_PAGES, "c": Reason.PRIORITY}
    assert order == ["b", "c"]


def test_reasons() -> None:
    scheduler = make(seqs=2, budget=8)
    scheduler.add(request("a", 5))
    scheduler.add(request("b", 20))
    scheduler.add(request("c", 1))
    step(scheduler)
    assert scheduler.reasons() == {"a": Reason.NONE, "b": Reason.NONE, "c": Reason.SLOTS}
    scheduler.abort("a")
    step(scheduler)
    assert scheduler.reasons() == {"b": Reason.NONE, "c": Reason.TOKEN_BUDGET}


def test_admission_leaves_every_running_sequence_a_page_to_grow() -> None:
    scheduler = make(pages=9, prefix_cache=False)
    scheduler.add(request("a", 8))
    scheduler.add(request("b", 8))
    scheduler.add(request("c", 8, max_tokens=1))
    assert [name for name, *_ in step(scheduler)] == ["a", "b", "c"]  # 6 of 8 pages, 2 to grow
    scheduler = make(pages=8, prefix_cache=False)
    scheduler.add(request("a", 8))
    scheduler.add(request("b", 8))
    scheduler.add(request("c", 8, max_tokens=1))
    assert [name for name, *_ in step(scheduler)] == ["a", "b"]
    assert scheduler.reasons()["c"] is Reason.NO_PAGES


def test_preemption_takes_the_last_one_and_its_recomputation_is_mostly_a_hit() -> None:
    scheduler = make(pages=8)
    scheduler.add(request("a", 11, max_tokens=8))
    victim = scheduler.add(request("b", 11, max_tokens=10))
    seen = []
    while scheduler.has_work:
        plan = scheduler.schedule()
        seen += [("preempted", name) for name in plan.preempted]
        seen += [(e.seq.request_id, e.start, e.count) for e in plan.entries if e.seq in plan.admitted]
        scheduler.commit(plan, [OUT] * len(plan.sampling))
        scheduler.check()
    # 7 pages: both hold 3, the 7th goes to a at token 12; b needs one at the same time but is last: it waits, until
    # a preempts it at token 16 and evicts one of its 3 full pages. The other two are a hit when a has ended.
    assert seen == [("a", 0, 11), ("b", 0, 11), ("preempted", "b"), ("b", 8, 5)]
    assert scheduler.preemptions == 1 and victim.finish == "length" and victim.num_output == 10
    assert victim.admissions == 2 and victim.cached_tokens == 0 and scheduler.prefix_queries == 22


def test_prefix_hit_leaves_one_token_to_compute() -> None:
    scheduler = make()
    prompt = list(range(12))
    scheduler.add(request("a", prompt, max_tokens=1))
    step(scheduler)
    scheduler.add(request("b", prompt, max_tokens=1))
    scheduler.add(request("c", [*prompt[:8], 99, 98], max_tokens=1))
    assert step(scheduler) == [("b", 8, 4, True), ("c", 8, 2, True)]
    scheduler.add(request("d", [*prompt, 5], max_tokens=1))
    seq = scheduler.get("d")
    assert step(scheduler) == [("d", 12, 1, True)] and seq.cached_tokens == 12
    assert (scheduler.prefix_queries, scheduler.prefix_hits) == (12 + 12 + 10 + 13, 8 + 8 + 12)


def test_prompts_of_other_salts_are_no_hits() -> None:
    s = make()
    for name, salt, hits in (("a", "x", 0), ("b", "x", 8), ("c", "y", 0), ("d", "", 0), ("e", "y", 8)):
        seq = s.add(replace(request(name, 9, max_tokens=1), prompt_ids=list(range(9)), cache_salt=salt))
        drain(s)
        assert seq.cached_tokens == hits, name


def test_output_is_cached_for_the_next_turn() -> None:
    scheduler = make()
    seq = scheduler.add(request("a", 4, max_tokens=6))
    drain(scheduler)
    scheduler.add(request("b", [*seq.tokens, 1, 2], max_tokens=1))
    assert step(scheduler) == [("b", 8, 4, True)]  # 9 of 10 tokens were computed: two full pages


def test_a_page_in_flight_is_not_a_hit() -> None:
    scheduler = make()
    prompt = list(range(9))
    scheduler.add(request("a", prompt))
    first = scheduler.schedule()
    scheduler.add(request("b", prompt))
    second = scheduler.schedule()
    assert ("b", 0, 9, True) in work(second)
    scheduler.commit(first, [OUT])
    scheduler.add(request("c", prompt))
    assert ("c", 8, 1, True) in work(scheduler.schedule())
    scheduler.check()


def test_a_page_computed_twice_stays_with_both() -> None:
    """mini-sglang frees the duplicate while a table still points at it (its PR 142)."""
    scheduler = make(pages=12)
    prompt = list(range(9))
    one, two = scheduler.add(request("a", prompt)), scheduler.add(request("b", prompt))
    step(scheduler)
    assert not set(one.block_table) & set(two.block_table)
    scheduler.abort("a")
    scheduler.check()
    scheduler.add(request("c", [50] * 20))
    step(scheduler)
    scheduler.check()
    assert not set(two.block_table) & set(scheduler.get("c").block_table)


def test_one_ahead_counts_the_unknown_token_and_never_passes_max_tokens() -> None:
    scheduler = make()
    seq = scheduler.add(request("a", 3, max_tokens=3))
    plans = [scheduler.schedule(), scheduler.schedule(), scheduler.schedule()]
    assert [work(plan)[0][1:] for plan in plans] == [(0, 3, True), (3, 1, True), (4, 1, True)]
    assert len(seq.tokens) == 3 and seq.pending == 3 and len(seq.block_table) == 2
    assert scheduler.schedule() is None and scheduler.has_work
    for plan, ended in zip(plans, ([], [], [seq]), strict=True):
        assert scheduler.commit(plan, [OUT]) == ended
        scheduler.check()


def test_one_ahead_drops_the_step_after_a_stop_and_holds_its_pages_until_then() -> None:
    scheduler = make(eos_ids=[2])
    seq = scheduler.add(request("a", 4))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert scheduler.commit(first, [2]) == [seq] and seq.finish == "stop"
    assert scheduler.pool.used == 2 and scheduler.schedule() is None and scheduler.has_work
    scheduler.check()
    assert scheduler.commit(second, [OUT]) == []
    assert scheduler.pool.used == 0 and seq.tokens[4:] == [2] and not scheduler.has_work
    assert scheduler.generation_tokens == 1


def test_abort_frees_at_once_or_with_the_last_step_in_flight() -> None:
    scheduler = make()
    scheduler.add(request("a", 4))
    assert scheduler.abort("a") and not scheduler.abort("a") and not scheduler.has_work
    scheduler.add(request("a", 4))
    step(scheduler)
    assert scheduler.abort("a") and scheduler.pool.used == 0
    scheduler.add(request("a", 4))
    plan = scheduler.schedule()
    assert scheduler.abort("a") and scheduler.pool.used == 1
    again = scheduler.add(request("a", 4))  # the id is free, the pages and the slot are not
    later = scheduler.schedule()
    assert again.slot == 1
    scheduler.check()
    scheduler.discard(plan)
    assert scheduler.pool.used == 1
    scheduler.commit(later, [OUT])
    assert again.num_output == 1
    drain(scheduler)


def test_finish_from_outside() -> None:
    scheduler = make()
    seq = scheduler.add(request("a", 4))
    step(scheduler)
    assert scheduler.finish("a", "stop") is seq and seq.finish == "stop"
    assert scheduler.finish("a", "stop") is None and scheduler.get("a") is None


def test_a_sequence_preempted_in_flight_keeps_its_token_and_waits_for_its_pages() -> None:
    scheduler = make()
    seq = scheduler.add(request("a", 8, max_tokens=5))
    plan = scheduler.schedule()
    assert scheduler.preempt("a") and not scheduler.preempt("a") and not scheduler.preempt("b")
    assert scheduler.schedule() is None and scheduler.reasons() == {"a": Reason.IN_FLIGHT}
    scheduler.check()
    assert scheduler.commit(plan, [OUT]) == [] and seq.tokens[8:] == [OUT] and scheduler.pool.used == 0
    plan = scheduler.schedule()
    assert work(plan) == [("a", 8, 1, True)] and plan.admitted == [seq] and plan.preempted == ["a"]
    scheduler.commit(plan, [OUT])
    drain(scheduler)
    assert seq.num_output == 5


def test_pages_on_their_way_back_do_not_preempt_more() -> None:
    scheduler = make(pages=7)
    for name in "abc":
        scheduler.add(request(name, 4, max_tokens=12))
    for _ in range(4):
        step(scheduler)  # 7 tokens are computed, 6 of 6 pages held
    plan = scheduler.schedule()
    assert scheduler.pool.available == 0
    assert scheduler.schedule() is None  # a and b need a page each; both will come from c, which plan still uses
    assert scheduler.preemptions == 1 and scheduler.running == 2
    assert scheduler.reasons() == {"a": Reason.NO_PAGES, "b": Reason.NO_PAGES, "c": Reason.NO_PAGES}
    scheduler.check()
    scheduler.commit(plan, [OUT] * len(plan.sampling))
    plan = scheduler.schedule()
    assert work(plan) == [("a", 8, 1, True), ("b", 8, 1, True)] and plan.preempted == ["c"]
    scheduler.commit(plan, [OUT] * len(plan.sampling))
    drain(scheduler)


@pytest.mark.parametrize("bad, param, words", [
    (request("a", 0), "prompt", "no tokens"),
    (request("a", 5, max_tokens=0), "max_tokens", "at least 1"),
    (request("a", 30, max_tokens=21), "max_tokens", "context holds 50.* at most 20"),
    (request("a", 50), "prompt", "context holds 50.*at most 49"),
    (request("a", 30, max_tokens=12), "max_tokens", "11 KV pages of 4 tokens, the pool has 10 .*at most 11"),
    (request("a", 41, max_tokens=1), "prompt", "11 KV pages.*at most 40"),
    (request("a", [1, -1]), "prompt", "token ids"),
    (request("a", [1, 2**32]), "prompt", "token ids"),
    (request("live", 1), "request_id", "'live' is in use"),
])
def test_what_can_never_finish_is_refused_with_the_numbers(bad, param, words) -> None:
    scheduler = make(pages=11, context=50)
    scheduler.add(request("live", 1))
    with pytest.raises(RequestError, match=words) as caught:
        scheduler.add(bad)
    assert caught.value.param == param and scheduler.waiting == 1
    scheduler.check()


def test_the_numbers_in_the_refusals_are_exact() -> None:
    for prompt, new in ((30, 11), (40, 1)):
        scheduler = make(pages=11, context=50)
        seq = scheduler.add(request("a", prompt, max_tokens=new))
        drain(scheduler)
        assert seq.finish == "length" and seq.num_output == new


def test_limits_are_checked() -> None:
    with pytest.raises(ConfigError, match="lower max_seqs to 8"):
        Limits(9, 8, 100)
    with pytest.raises(ConfigError, match="max_context"):
        Limits(1, 1, 0)


def test_plans_are_committed_in_order() -> None:
    scheduler = make()
    scheduler.add(request("a", 3))
    scheduler.schedule()
    second = scheduler.schedule()
    with pytest.raises(ValueError, match="out of order"):
        scheduler.commit(second, [OUT])


def test_aborted_requests_behind_a_waiting_head_are_forgotten() -> None:
    scheduler = make(seqs=1)
    scheduler.add(request("a", 3))
    step(scheduler)
    scheduler.add(request("b", 3))
    for i in range(1000):
        scheduler.add(request(f"c{i}", 3))
        scheduler.abort(f"c{i}")
    assert len(scheduler._line._heap) < 200 and scheduler.waiting == 1
    drain(scheduler)


@pytest.mark.parametrize("size", [1, 4])
def test_the_worst_load_drains_without_a_preemption_storm(size: int) -> None:
    """Ten times more requests than fit, each of which would fill the pool alone: recomputation stays bounded."""
    scheduler = make(pages=40 // size + 1, size=size, seqs=10, budget=16)
    seqs = [scheduler.add(request(f"{i}", [i] * 3, max_tokens=38)) for i in range(20)]
    computed = 0
    while scheduler.has_work:
        computed += sum(count for *_, count, _ in step(scheduler))
        assert computed < 2 * 20 * 40
    assert all(seq.finish == "length" and seq.num_output == 38 for seq in seqs)
    assert 0 < scheduler.preemptions < 3 * len(seqs)


def test_same_inputs_same_plans() -> None:
    def play() -> list:
        rng, log = random.Random(5), []
        scheduler = make(pages=20, size=2, seqs=5, budget=12, eos_ids=[1])
        plans: list[StepPlan] = []
        for turn in range(2000):
            if rng.random() < 0.6 and scheduler.waiting < 8:
                prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 20))]
                scheduler.add(request(f"{turn}", prompt, max_tokens=rng.randrange(1, 18), priority=rng.randrange(2)))
            if rng.random() < 0.02 and scheduler._live:
                scheduler.abort(rng.choice(list(scheduler._live)))
            plan = scheduler.schedule()
            if plan is not None:
                plans.append(plan)
                log.append((work(plan), [list(e.seq.block_table) for e in plan.entries],
                            [e.seq.slot for e in plan.entries], plan.preempted))
            if plans and (plan is None or len(plans) > 1):
                done = plans.pop(0)
                scheduler.commit(done, [rng.randrange(20) for _ in done.sampling])
        assert scheduler.preemptions > 20 and scheduler.prefix_hits > 100
        return log

    assert play() == play()


def test_a_sequence_with_a_grammar_has_two_unknown_tokens_at_most_and_others_more() -> None:
    class Grammar:
        def matcher(self, stop_ids):
            return SimpleNamespace(busy=False)

    scheduler = make()
    held, free = scheduler.add(request("a", 4, max_tokens=5), Grammar()), scheduler.add(request("b", 4, max_tokens=9))
    assert scheduler.constrained == 1
    plans = [scheduler.schedule() for _ in range(3)]
    assert [[e.seq for e in plan.entries] for plan in plans] == [[held, free], [held, free], [free]]
    assert [entry.waits for plan in plans for entry in plan.entries] == [False, False, True, False, False]
    scheduler.commit(plans[0], [OUT, OUT])
    assert not any(entry.waits for entry in plans[1].entries)
    plans.append(scheduler.schedule())
    assert [e.seq for e in plans[3].entries] == [held, free]
    for plan in plans[1:]:
        scheduler.commit(plan, [OUT] * len(plan.sampling))
        scheduler.check()
    assert scheduler.schedule() is not None and scheduler.abort("a") and scheduler.constrained == 0
