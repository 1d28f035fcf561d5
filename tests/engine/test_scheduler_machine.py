"""The scheduler against a model of the device: what is written to each page, and what each step would read.

The model device runs steps in order, any time between schedule and commit; a step with a sequence under a grammar waits for the
commit of the one before, and no other one is scheduled meanwhile; now and then a mask is not there, and comes any time later.
A token's keys and values stand for the whole prefix that they depend on, so a page that is reused too early, shared wrongly or
indexed before it is written shows as a step that reads another sequence's prefix.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from types import SimpleNamespace
from typing import cast

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from model_core.cache.pages import PagePool
from model_core.engine.request import Request, SamplingParams
from model_core.engine.scheduler import Limits, Scheduler, StepPlan
from model_core.engine.sequence import Sequence, State
from model_core.errors import RequestError
from model_core.grammar.matcher import Compiled, Matcher

STOP = 1  # of the two token ids 0 and 1


class Held(Matcher):
    """Allows everything, sometimes late."""

    def __init__(self) -> None:
        self.coming, self.missed = None, False

    def ask(self, slow: bool) -> None:
        """When a token is sampled."""
        if slow and self.coming is None:
            self.coming = Future()
        if self.coming is not None:
            self.missed = not self.coming.done()
            self.coming = self.coming if self.missed else None


GRAMMAR = cast(Compiled, SimpleNamespace(matcher=lambda stop_ids: Held()))


class Device:
    """Runs plans with the block tables they were scheduled with. `tokens`: what it knows of each sequence."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.memory: dict[int, tuple[int, ...]] = {}  # address: the prefix whose last token was written there
        self.tokens: dict[Sequence, list[int]] = {}
        self.tables: dict[Sequence, list[int]] = {}
        self.queue: deque[tuple[StepPlan, list[list[int]]]] = deque()
        self.unmasked: list[StepPlan] = []
        self.scored: dict[Sequence, int] = {}  # positions whose logits were asked for and computed, 0 to this

    def launch(self, plan: StepPlan) -> None:
        for seq in plan.admitted:
            self.tokens.setdefault(seq, list(seq.tokens))
        for seq in [*plan.admitted, *plan.grown]:
            self.tables[seq] = list(seq.block_table)
        tables = [self.tables[entry.seq] for entry in plan.entries]
        assert tables == [entry.seq.block_table for entry in plan.entries], "a block table changed and the plan does not say so"
        self.queue.append((plan, tables))
        self.unmasked.append(plan)

    def ask(self, choose) -> None:
        """Fill the masks of plans that do not wait, before another one is scheduled."""
        for plan in self.unmasked:
            for entry in plan.entries:
                if entry.samples and entry.seq.matcher is not None and entry.seq.finish is None:
                    entry.seq.matcher.ask(choose())
        self.unmasked.clear()

    @property
    def waits(self) -> bool:
        """Whether the newest step cannot be executed yet: a mask depends on a token that is not committed."""
        return bool(self.queue) and any(entry.waits for entry in self.queue[-1][0].entries if entry.seq.finish is None)

    def run(self, choose) -> list[int]:
        """Execute the oldest launched plan; returns the sampled tokens of all its entries that sample."""
        if self.unmasked and not self.waits:
            self.ask(choose)
        plan, tables = self.queue.popleft()
        size, sampled = self.page_size, []
        for entry, table in zip(plan.entries, tables, strict=True):  # all of a layer's writes come before its reads
            known = self.tokens[entry.seq]
            end = entry.start + entry.count
            assert end <= len(known), "an input token does not exist yet"
            for position in range(entry.start, end):
                self.memory[table[position // size] * size + position % size] = tuple(known[: position + 1])
        for entry, table in zip(plan.entries, tables, strict=True):
            known = self.tokens[entry.seq]
            end = entry.start + entry.count
            for position in range(end):
                read = self.memory.get(table[position // size] * size + position % size)
                assert read == tuple(known[: position + 1]), f"position {position} is read as {read}"
            assert entry.samples == (end == len(known))
            if entry.samples:
                assert entry.seq.finish is not None or not entry.waits, "a mask depends on a token that the host does not know"
                sampled.append(-1 if entry.seq.sits_out else choose())
                known += sampled[-1:] if sampled[-1] >= 0 else []
        for seq, chunk, start, count in plan.scored:
            assert plan.chunks[chunk].seq is seq and start == self.scored.get(seq, 0), "a position is scored twice, or not"
            assert plan.chunks[chunk].start <= start < start + count <= plan.chunks[chunk].start + plan.chunks[chunk].count
            self.scored[seq] = start + count
        return sampled


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(pages=st.integers(2, 40), size=st.integers(1, 3), seqs=st.integers(1, 5), spare=st.integers(0, 8),
                depth=st.integers(1, 5), cache=st.booleans())
    def build(self, pages: int, size: int, seqs: int, spare: int, depth: int, cache: bool) -> None:
        """depth: plans in flight at most; 1 is the synchronous engine, 2 is one step ahead."""
        self.limits = Limits(seqs, seqs + spare, 30)
        self.scheduler = Scheduler(PagePool(pages, size, prefix_cache=cache), self.limits, eos_ids=[STOP])
        self.device = Device(size)
        self.depth = depth
        self.flights: deque[StepPlan] = deque()
        self.results: deque[list[int]] = deque()
        self.live: dict[str, Sequence] = {}
        self.noise = 1
        self.names = 0

    def choose(self) -> int:
        self.noise = self.noise * 6364136223846793005 % (1 << 64) + 1
        return self.noise >> 40 & 1

    @rule(prompt=st.lists(st.integers(0, 1), max_size=16), new=st.integers(0, 20), priority=st.integers(0, 2),
          ignore_eos=st.booleans(), least=st.integers(0, 4), score=st.booleans(), held=st.booleans())
    def add(self, prompt: list[int], new: int, priority: int, ignore_eos: bool, least: int, score: bool, held: bool) -> None:
        params = SamplingParams(max_tokens=new, ignore_eos=ignore_eos, min_tokens=least, prompt_logprobs=0 if score else None)
        request = Request(f"{self.names}", prompt, params, priority)
        self.names += 1
        pool, total = self.scheduler.pool, len(prompt) + new
        room = (pool.num_pages - 1) * pool.page_size
        fits = prompt and (new or score) and total <= 30 and len(prompt) + max(0, new - 1) <= room
        try:
            self.live[request.request_id] = self.scheduler.add(request, GRAMMAR if held else None)
            assert fits
        except RequestError:
            assert not fits

    @precondition(lambda self: len(self.flights) < self.depth and not self.device.waits)
    @rule()
    def schedule(self) -> None:
        scheduler, limits = self.scheduler, self.limits
        self.device.ask(self.choose)
        plan = scheduler.schedule()
        if plan is None:
            assert self.flights or scheduler.coming() or not self.live, "live sequences, nothing in flight, and no plan"
            return
        assert 0 < plan.num_tokens == sum(entry.count for entry in plan.entries) <= limits.max_batch_tokens
        assert all(entry.count == 1 and entry.samples for entry in plan.entries[: plan.num_decodes])
        assert len({entry.seq for entry in plan.entries}) == len(plan.entries) <= limits.max_seqs
        scheduled = {entry.seq for entry in plan.entries}
        assert all(seq in scheduled or seq.total == seq.limit or seq.total - seq.computed > 1
                   or seq.reason.value in ("no_pages", "mask")
                   for seq in scheduler._running), "one that misses one token was passed over"
        self.device.launch(plan)
        if plan.step % 3:
            self.scheduler.launched(plan)
        self.flights.append(plan)

    @precondition(lambda self: len(self.device.queue) > 1 or (self.device.queue and not self.device.waits))
    @rule(noise=st.integers(0, 1 << 20))
    def execute(self, noise: int) -> None:
        self.noise ^= noise
        self.results.append(self.device.run(self.choose))

    @precondition(lambda self: self.flights)
    @rule()
    def commit(self) -> None:
        if not self.results:
            self.results.append(self.device.run(self.choose))
        plan, sampled = self.flights.popleft(), self.results.popleft()
        ended = self.scheduler.commit(plan, sampled)
        for seq in ended:
            output = seq.tokens[seq.num_prompt :]
            params = seq.request.params
            assert self.device.scored.get(seq, 0) == (len(seq.request.prompt_ids) - 1) * (params.prompt_logprobs is not None)
            if not params.max_tokens:
                assert seq.finish == "length" and len(output) == 1
                assert self.live.pop(seq.request_id) is seq
                continue
            stops = [i + 1 for i, token in enumerate(output) if token == STOP and i + 1 >= params.min_tokens]
            if params.ignore_eos or not stops:
                assert seq.finish == "length" and len(output) == params.max_tokens
            else:
                assert seq.finish == "stop" and stops == [len(output)]
            assert self.live.pop(seq.request_id) is seq

    @precondition(lambda self: self.scheduler.coming())
    @rule(data=st.data())
    def mask_comes(self, data) -> None:
        data.draw(st.sampled_from(self.scheduler.coming())).set_result(None)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), reason=st.sampled_from(["abort", "stop", "error"]))
    def finish(self, data, reason) -> None:
        name = data.draw(st.sampled_from(sorted(self.live)))
        seq = self.live.pop(name)
        assert self.scheduler.finish(name, reason) is seq and seq.finish == reason
        assert not self.scheduler.abort(name)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def preempt(self, data) -> None:
        name = data.draw(st.sampled_from(sorted(self.live)))
        running = self.live[name].state is State.RUNNING
        assert self.scheduler.preempt(name) == running

    @invariant()
    def everything_agrees(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        scheduler = self.scheduler
        scheduler.check()
        assert scheduler.running + scheduler.waiting == len(self.live) == len(scheduler.reasons())
        assert scheduler.in_flight == len(self.flights)
        for seq in self.live.values():
            assert seq.tokens == self.device.tokens.get(seq, seq.tokens)[: len(seq.tokens)]

    def teardown(self) -> None:
        """Everything that was accepted ends, and every page comes back."""
        if not hasattr(self, "scheduler"):
            return
        bound = 100 + 20 * sum(seq.limit for seq in self.live.values())
        while self.scheduler.has_work:
            while len(self.flights) < self.depth:
                before = len(self.flights)
                if not self.device.waits:
                    self.schedule()
                if len(self.flights) == before:
                    break
            for coming in self.scheduler.coming()[bound % 3 : bound % 3 + 1] if self.flights else self.scheduler.coming():
                coming.set_result(None)
            if self.flights:
                self.commit()
            self.everything_agrees()
            bound -= 1
            assert bound, "accepted requests do not end"
        assert not self.live and self.scheduler.pool.used == 0


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=300, stateful_step_count=50, deadline=None, derandomize=True)
