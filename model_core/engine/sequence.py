"""A sequence: one request while it lives in the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from model_core.cache.prefix import Node
from model_core.engine.request import UNANSWERABLE, FinishReason, Request, TokenEvent

if TYPE_CHECKING:
    from model_core.grammar.matcher import Compiled, Matcher


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Reason(Enum):
    """Why a live sequence is not part of the last plan."""

    NONE = "none"  # it is part of it, or only waits for the result of a step in flight
    NO_PAGES = "no_pages"  # too few pages are free or evictable
    TOKEN_BUDGET = "token_budget"  # the step is full
    SLOTS = "slots"  # max_seqs sequences run
    PRIORITY = "priority"  # it waits behind one that is more urgent or came earlier
    IN_FLIGHT = "in_flight"  # preempted, and a step on the device still uses its pages
    MASK = "mask"  # what its grammar allows next is not known yet: see model_core/grammar/beside.py


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens and how far they are computed. Only the scheduler and what it is made of write these fields.

    tokens          prompt and output ids that the host knows
    total           len(tokens), plus one for each token that a step in flight will sample
    computed        tokens [0, computed) have, or will have after the steps in flight, keys and values in the pages
    block_table     page of position p: block_table[p // page_size]. Only appended to while `admissions` stays the
                    same; a mirror is up to date if (admissions, len(block_table)) is
    in_flight       scheduled plans, not committed yet, that use this sequence's pages
    admissions      times it was admitted: 1 + times it came back after a preemption
    scored          prompt positions whose logits were asked for, or need not be: see Scored
    matcher         says what its grammar allows next, from the tokens that the host knows; None without a grammar. So such a
                    sequence is not scheduled while two tokens of it are in flight

    Invariants: computed < total <= limit, len(tokens) <= total, and pages cover every computed token.
    """

    request: Request
    request_id: str
    arrival: int  # order of arrival at the scheduler
    stop_ids: frozenset[int]  # the request's, and the model's eos unless ignored
    tokens: list[int]
    num_prompt: int
    limit: int  # len(tokens) at which it ends: prompt + max_tokens, but at least one: a prompt alone ends by a token, too
    total: int
    rank: tuple[int, int]  # who goes first: (priority, arrival), lowest first
    computed: int = 0
    block_table: list[int] = field(default_factory=list)
    slot: int | None = None
    cached_tokens: int = 0  # prompt tokens found in the prefix cache at its first admission
    in_flight: int = 0
    admissions: int = 0
    state: State = State.WAITING
    reason: Reason = Reason.NONE
    finish: FinishReason | None = None
    indexed: int = 0  # pages of the block table that the prefix index was told about
    node: Node | None = None  # of the last of them
    scored: int = 0
    matcher: Matcher | None = None
    arrived_at: float = field(default_factory=time.perf_counter)
    admitted_at: float = 0.0  # for the first time

    @classmethod
    def of(cls, request: Request, arrival: int, eos_ids: frozenset[int] = frozenset(),
           grammar: Compiled | None = None) -> Sequence:  # fmt: skip
        """A new, waiting sequence. eos_ids: of the model; added to the stop ids unless the request ignores them."""
        params, prompt = request.params, len(request.prompt_ids)
        stop_ids = frozenset(params.stop_ids) | (frozenset() if params.ignore_eos else eos_ids)
        return cls(request, request.request_id, arrival, stop_ids if params.max_tokens else frozenset(),
                   list(request.prompt_ids), prompt, prompt + max(1, params.max_tokens), prompt, (request.priority, arrival),
                   matcher=grammar.matcher(stop_ids) if grammar is not None and params.max_tokens else None)

    @property
    def num_output(self) -> int:
        """Output tokens that the host knows."""
        return len(self.tokens) - self.num_prompt

    @property
    def to_score(self) -> int:
        """Positions whose logits are wanted: all of the prompt but the last one."""
        return 0 if self.request.params.prompt_logprobs is None else self.num_prompt - 1

    @property
    def pending(self) -> int:
        """Tokens that steps in flight will sample."""
        return self.total - len(self.tokens)

    @property
    def sits_out(self) -> bool:
        """The step in flight has no token of it: its mask was not there."""
        return self.matcher is not None and self.matcher.missed

    def ends(self) -> FinishReason | None:
        """The reason if the sequence ends with its last token. Stop ids count from min_tokens on."""
        if self.tokens[-1] in self.stop_ids and self.num_output >= max(1, self.request.params.min_tokens):
            return "stop"
        return "length" if len(self.tokens) >= self.limit else None

    def why_none(self, token: int) -> str:
        """What to tell the client of a sampler's result that is no token: -1 or -2, see Sampled."""
        if token == -1 or self.matcher is None:
            return "the model produced logits that are not finite numbers"
        if self.num_output < self.request.params.min_tokens and self.matcher.failure is None:
            return UNANSWERABLE + "its grammar allows nothing but an end here, and min_tokens no end yet"
        return UNANSWERABLE + (self.matcher.failure or "its grammar allows no token here")

    def first(self, event: TokenEvent) -> TokenEvent:
        """The event of its first token, with what is told once; without the token if none was asked for."""
        waits = (self.admitted_at - self.arrived_at, time.perf_counter() - self.admitted_at)
        event = event._replace(cached_tokens=self.cached_tokens, waits=waits)
        return event if self.request.params.max_tokens else event._replace(token_ids=[], logprobs=None)

    def check(self, page_size: int) -> None:
        """Assert the invariants; for tests."""
        assert self.computed < self.total <= self.limit, (self.computed, self.total, self.limit)
        assert len(self.tokens) <= self.total
        assert self.finish is not None or self.pending <= self.in_flight
        assert (self.slot is None) == (self.state is not State.RUNNING and not self.in_flight)
        if self.state is State.RUNNING:
            assert len(self.block_table) * page_size >= self.computed
        if self.slot is None:
            assert not self.block_table and not self.computed
