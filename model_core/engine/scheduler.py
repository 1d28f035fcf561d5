"""The scheduler: which tokens of which sequences the next step computes, and whose pages they go to.

One rule. A sequence has tokens and a count of computed ones; every step moves computed toward total within a token
budget. Chunked prefill, prefix hits and recomputation after a preemption are all that rule (as in vLLM v1).

Policy
- Running sequences that miss one token (decodes) go first, so a long prompt cannot delay them; then prompts already
  begun, then the queue, each by (priority, arrival).
- Strictly no bypass in the queue: while its head cannot be admitted, nobody behind it is. A big request thus waits
  only for those before it, at the price of pages that a small one could have used meanwhile.
- A sequence is admitted if all its known tokens fit and one page is left for each running sequence to grow into;
  with nothing running, always. So a preempted sequence comes back when another one has ended, not at once to push
  out the next one.
- When a decode needs a page and none is left, the last running sequence by (priority, arrival) is preempted: its
  pages are released (full ones stay in the prefix index, so that most of its recomputation is a hit) and it goes back
  to the queue with its rank. The last one itself does not preempt anybody, it waits.
- Hence the first running sequence always advances, and as no request is accepted that the whole pool could not hold,
  every admitted sequence ends.

Steps ahead. `schedule` may be called again before the plans before it are committed, so that the host works
while the device does. The token that a step in flight will sample is then counted in `total` but not known;
max_tokens is, so no step is scheduled past it. Of a sequence with a grammar one such token may be unknown, not two: it is
known when the step that follows it is sampled, if not when that is launched (flight.InFlight.rest). A step that was
scheduled past a stop is computed and its result dropped. So is one that was sampled before a mask was there: the sequence
is not scheduled until it is (Sequence.sits_out), and computes that token again.
"""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from model_core.cache.pages import PagePool
from model_core.engine.holdings import Holdings
from model_core.engine.line import Line
from model_core.engine.plan import Limits, Scheduled, Scored, StepPlan, check_request
from model_core.engine.request import FinishReason, Request
from model_core.engine.sequence import Reason, Sequence, State
from model_core.errors import RequestError

if TYPE_CHECKING:
    from model_core.grammar.matcher import Compiled

_rank = attrgetter("rank")


class Scheduler:
    """Owns all live sequences. Single-threaded: the engine thread calls every method.

    eos_ids: end-of-sequence ids of the model, for requests that do not ignore them.
    Totals since start, in tokens: prompt_tokens (admitted), generation_tokens, prefix_queries and prefix_hits (both
    of first admissions, so that the hit rate is the traffic's and not the preemptions'); and `preemptions`.
    """

    def __init__(self, pool: PagePool, limits: Limits, *, eos_ids: Iterable[int] = ()) -> None:
        self.pool = pool
        self.limits = limits
        self.preemptions = self.prefix_queries = self.prefix_hits = self.prompt_tokens = self.generation_tokens = 0
        self._eos_ids = frozenset(eos_ids)
        self._live: dict[str, Sequence] = {}
        self._running: list[Sequence] = []  # by rank
        self._line = Line()
        self._holdings = Holdings(pool, limits.max_seqs)
        self._plans: deque[StepPlan] = deque()  # scheduled and not committed, oldest first
        self._stalled: list[Sequence] = []  # those with a reason
        self._preempted: list[str] = []  # since the last plan
        self._arrivals = 0
        self.constrained = 0  # live sequences with a grammar
        self._steps = 0

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._line)

    @property
    def in_flight(self) -> int:
        """Plans that are scheduled and not committed."""
        return len(self._plans)

    @property
    def has_work(self) -> bool:
        """Some sequence is live or some plan is not committed."""
        return bool(self._live or self._plans)

    def get(self, request_id: str) -> Sequence | None:
        """The live sequence of this request."""
        return self._live.get(request_id)

    def reasons(self) -> dict[str, Reason]:
        """Why each live sequence is not part of the last plan, by request id; Reason.NONE if it is."""
        return {key: seq.reason if seq.state is State.RUNNING or seq.reason is not Reason.NONE else Reason.PRIORITY
                for key, seq in self._live.items()}

    def coming(self) -> list[Future[Any]]:
        """Masks that are not there yet, of sequences that run."""
        matchers = [seq.matcher for seq in self._running if seq.matcher is not None]
        return [matcher.coming for matcher in matchers if matcher.coming is not None and not matcher.coming.done()]

    def add(self, request: Request, grammar: Compiled | None = None) -> Sequence:
        """Queue a request. Raises RequestError, with the numbers, if it could never finish or its id is in use."""
        self.check_id(request.request_id)
        check_request(request, self.limits, self.pool)
        seq = Sequence.of(request, self._arrivals, self._eos_ids, grammar)
        self.constrained += seq.matcher is not None
        self._arrivals += 1
        self._live[request.request_id] = seq
        self._line.push(seq)
        return seq

    def check_id(self, request_id: str) -> None:
        """Raises RequestError if a live request has this id. Any thread may ask."""
        if request_id in self._live:
            raise RequestError(f"request_id {request_id!r} is in use by a live request: ids must be unique", param="request_id",
                               code="duplicate_request_id")  # fmt: skip

    def abort(self, request_id: str) -> bool:
        """End a request without its result; False if it is not live. Pages: see `finish`."""
        return self.finish(request_id, "abort") is not None

    def finish(self, request_id: str, reason: FinishReason) -> Sequence | None:
        """End a request from outside, e.g. at a stop string; None if it is not live.

        Its pages are available after this, or after the commit of the last plan in flight that uses them.
        """
        seq = self._live.get(request_id)
        if seq is not None:
            self._end(seq, reason)
        return seq

    def preempt(self, request_id: str) -> bool:
        """Send a running sequence back to the queue, as if its pages were needed; False if it does not run."""
        seq = self._live.get(request_id)
        if seq is None or seq.state is not State.RUNNING:
            return False
        self._preempt(seq)
        return True

    def schedule(self) -> StepPlan | None:
        """The next step, or None if no token can be computed now: nothing is live, or plans in flight come first.

        With a live sequence and no plan in flight there is always a plan, unless a mask is awaited.
        """
        for seq in self._stalled:
            seq.reason = Reason.NONE
        self._stalled.clear()
        decodes: list[Sequence] = []
        starts: list[int] = []
        grown: list[Sequence] = []
        begun: list[Sequence] = []  # more than one token is missing
        page_size = self.pool.page_size
        short = 0  # decodes without a page
        for seq in self._running:  # _grow may drop sequences from the end of this list, never one that we met already
            start, total = seq.computed, seq.total
            if total - start > 1:
                begun.append(seq)
            elif total < seq.limit:  # else its last token is in flight
                if seq.matcher is not None:
                    if seq.matcher.busy:
                        self._stall(seq, Reason.MASK)
                        continue
                    if seq.pending > 1:
                        continue  # what may come next depends on both tokens
                if start >= len(seq.block_table) * page_size:
                    if not self._grow(seq, short):
                        short += 1
                        self._stall(seq, Reason.NO_PAGES)
                        continue
                    grown.append(seq)
                decodes.append(seq)
                starts.append(start)
                seq.computed = total
                seq.total = total + 1
                seq.in_flight += 1
        chunks: list[Scheduled] = []
        left = self.limits.max_batch_tokens - len(decodes)
        for seq in begun:
            left -= self._chunk(seq, left, chunks)
        admitted = self._admit(left, chunks) if not short else []
        if not decodes and not chunks:
            return None
        plan = StepPlan(self._steps, decodes, starts, chunks, admitted, grown, self._preempted, Scored.of(chunks))
        self._preempted = []
        self._steps += 1
        self._plans.append(plan)
        return plan

    def launched(self, plan: StepPlan) -> None:
        """The device will do `plan`, before any later one: prompts that come now may share its pages. Optional: `commit` does
        it too, but then the first token waits for it (2.5 us a page)."""
        for seq, start, count, _ in plan.chunks:  # a last token may be known to the device alone
            self._holdings.index(seq, min(start + count, len(seq.tokens)) // self.pool.page_size)

    def commit(self, plan: StepPlan, tokens: list[int]) -> list[Sequence]:
        """The device has done `plan`, the oldest in flight. Returns the sequences that ended by it.

        tokens: an id for each of plan.sampling, less than 0 for those that sat it out; those of sequences that have ended
        meanwhile are dropped. A preempted sequence keeps its token: only its pages are lost.
        """
        if not self._plans or self._plans[0] is not plan:
            raise ValueError(f"step {plan.step} is committed out of order: "
                             f"{[waiting.step for waiting in self._plans]} are in flight")
        self._plans.popleft()
        page_size = self.pool.page_size
        for seq, start in zip(plan.decodes, plan.starts, strict=True):
            seq.in_flight -= 1
            if not (start + 1) % page_size and seq.finish is None:
                self._holdings.index(seq, (start + 1) // page_size)
        for seq, start, count, _ in plan.chunks:
            seq.in_flight -= 1
            if seq.finish is None:
                self._holdings.index(seq, (start + count) // page_size)
        ended, generated = [], 0
        for seq, token in zip(plan.sampling, tokens, strict=True):
            if seq.finish is None and token < 0:
                assert seq.matcher is not None and seq.matcher.missed
                seq.matcher.missed = False
                seq.total -= 1
                seq.computed = min(seq.computed, seq.total - 1)
            elif seq.finish is None:
                known = seq.tokens
                known.append(token)
                generated += 1
                if (token in seq.stop_ids or len(known) >= seq.limit) and (reason := seq.ends()):
                    generated -= not seq.request.params.max_tokens  # by which a prompt alone ends; nobody gets it
                    self._end(seq, reason)
                    ended.append(seq)
        self.generation_tokens += generated
        if self._holdings.leaving:
            self._holdings.settle((*plan.decodes, *(chunk.seq for chunk in plan.chunks)))
        if not self._live and not self._holdings.leaving and self.pool.used:
            raise RuntimeError(f"{self.pool.used} KV pages leaked: no sequence is left and they are still in use")
        return ended

    def discard(self, plan: StepPlan) -> None:
        """The device will not do `plan`, the oldest in flight, and all of its sequences have ended."""
        self.commit(plan, [0] * len(plan.sampling))

    def check(self) -> None:
        """Compare every structure with every other; AssertionError on a difference. For tests: costs O(pages)."""
        everyone = [*self._live.values(), *(seq for seq in self._holdings.leaving if seq.finish is not None)]
        self._holdings.check(everyone)
        uses = [seq for plan in self._plans for seq in {entry.seq for entry in plan.entries}]
        assert all(seq.in_flight == uses.count(seq) for seq in everyone)
        assert self._running == sorted((seq for seq in everyone if seq.state is State.RUNNING), key=_rank)
        self._line.check(seq for seq in everyone if seq.state is State.WAITING)

    def _stall(self, seq: Sequence, reason: Reason) -> None:
        seq.reason = reason
        self._stalled.append(seq)

    def _chunk(self, seq: Sequence, left: int, chunks: list[Scheduled]) -> int:
        """Schedule up to `left` tokens of a sequence whose pages are there; returns how many."""
        start = seq.computed
        count = min(seq.total - start, left)
        if not count:
            self._stall(seq, Reason.TOKEN_BUDGET)
            return 0
        seq.computed = start + count
        seq.in_flight += 1
        samples = seq.computed == seq.total
        seq.total += samples
        chunks.append(Scheduled(seq, start, count, samples))
        return count

    def _grow(self, seq: Sequence, short: int) -> bool:
        """One more page for a decode, preempting from the end if there is none. False: it must wait.

        short: decodes that wait already for pages which steps in flight still use; preempting more sequences for
        them would gain nothing.
        """
        while (pages := self.pool.allocate(1)) is None:
            if self._holdings.coming > short:
                return False
            if self._running[-1] is seq:
                return False
            self._preempt(self._running[-1])
        seq.block_table += pages
        return True

    def _admit(self, left: int, chunks: list[Scheduled]) -> list[Sequence]:
        """Move sequences from the line to running while slots, tokens and pages last."""
        admitted: list[Sequence] = []
        while (seq := self._line.head()) is not None:
            if seq.in_flight:
                reason = Reason.IN_FLIGHT
            elif not self._holdings.has_slot:
                reason = Reason.SLOTS
            elif not left:
                reason = Reason.TOKEN_BUDGET
            elif not self._holdings.take(seq, spare=len(self._running)):
                reason = Reason.NO_PAGES
            else:
                self._line.pop()
                self._start(seq)
                admitted.append(seq)
                left -= self._chunk(seq, left, chunks)
                continue
            self._stall(seq, reason)
            break
        return admitted

    def _start(self, seq: Sequence) -> None:
        if not seq.admissions:
            seq.admitted_at = time.perf_counter()
            seq.cached_tokens = seq.computed
            self.prefix_queries += 0 if seq.to_score else seq.num_prompt
            self.prefix_hits += seq.cached_tokens
            self.prompt_tokens += seq.num_prompt
        seq.admissions += 1
        seq.state = State.RUNNING
        insort(self._running, seq, key=_rank)

    def _preempt(self, seq: Sequence) -> None:
        self._stop_running(seq, State.WAITING)
        self._stall(seq, Reason.NO_PAGES)
        self._line.push(seq)
        self.preemptions += 1
        self._preempted.append(seq.request_id)

    def _end(self, seq: Sequence, reason: FinishReason) -> None:
        del self._live[seq.request_id]
        self.constrained -= seq.matcher is not None
        seq.finish = reason
        if reason == "error":  # whatever made it fail may lie in its pages
            self.pool.forget(seq.block_table)
        if seq.state is State.RUNNING:
            self._stop_running(seq, State.FINISHED)
        else:
            seq.state = State.FINISHED
            self._line.left()

    def _stop_running(self, seq: Sequence, state: State) -> None:
        del self._running[bisect_left(self._running, seq.rank, key=_rank)]
        seq.state = state
        self._holdings.leave(seq)
