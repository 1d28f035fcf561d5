"""What sequences hold while they run: a slot, and pages for their tokens."""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heappop, heappush

from model_core.cache.pages import PagePool
from model_core.engine.sequence import Sequence, State


class Holdings:
    """Slots, and pages of the pool, from a sequence's admission on. Those of one that left are given back when the last plan
    that uses them is committed.

    A page enters the prefix index once the device has been given the plan that fills it: plans run in order, so who finds the
    page there reads it after it was written.

    leaving: sequences that do not run now, while plans in flight still use their pages.
    """

    def __init__(self, pool: PagePool, slots: int) -> None:
        self.pool = pool
        self.leaving: set[Sequence] = set()
        self._all_slots = slots
        self._slots = list(range(slots))  # heap of the free ones
        self._short: tuple[Sequence, int] | None = None  # who was refused last, and how many pages it waits for

    @property
    def has_slot(self) -> bool:
        """A slot is free."""
        return bool(self._slots)

    @property
    def coming(self) -> int:
        """Pages that will be available when no plan is in flight any more."""
        return sum(self.pool.exclusive(seq.block_table) for seq in self.leaving)

    def take(self, seq: Sequence, spare: int) -> bool:
        """A slot, which must be there, and pages for all known tokens of a sequence, as many as possible from the prefix index.
        False, and no change, if less than `spare` pages would be left."""
        pool = self.pool
        room = pool.available - spare
        if self._short is not None and self._short[0] is seq and room < self._short[1]:
            return False  # too little was freed since it was looked at: do not walk a long prompt again every step
        # What is found is not computed, so there would be no logits of it: nothing may be before they were there once.
        findable = seq.tokens[: seq.scored + 1] if seq.to_score else seq.tokens
        hits, node = pool.match(findable, seq.request.cache_salt.encode())
        fresh = pool.pages_for(seq.total) - len(hits)
        needed = fresh + pool.cost(hits)
        if needed > room:
            self._short = (seq, needed)
            return False
        self._short = None
        pool.acquire(hits)
        pages = pool.allocate(fresh)
        assert pages is not None
        seq.slot = heappop(self._slots)
        seq.block_table = hits + pages
        seq.computed = len(hits) * pool.page_size
        seq.indexed, seq.node = len(hits), node
        return True

    def index(self, seq: Sequence, full: int) -> None:
        """Tell the prefix index that the first `full` pages of a sequence are written, or will be by plans that the
        device has been given."""
        size = self.pool.page_size
        for page in range(seq.indexed, full):
            seq.node = self.pool.insert(seq.node, seq.tokens[page * size : (page + 1) * size], seq.block_table[page])
        seq.indexed = max(seq.indexed, full)

    def leave(self, seq: Sequence) -> None:
        """Give back what a sequence holds that does not run any more: now, or by `settle`."""
        if seq.in_flight:
            self.leaving.add(seq)
        else:
            self._release(seq)

    def settle(self, seqs: Iterable[Sequence]) -> None:
        """A plan with these sequences is done: what no other one uses is given back."""
        for seq in seqs:
            if not seq.in_flight and seq in self.leaving:
                self.leaving.remove(seq)
                self._release(seq)

    def _release(self, seq: Sequence) -> None:
        assert seq.slot is not None and not seq.in_flight
        heappush(self._slots, seq.slot)
        self.pool.release(seq.block_table)
        seq.slot, seq.block_table, seq.computed, seq.indexed, seq.node = None, [], 0, 0, None

    def check(self, seqs: Iterable[Sequence]) -> None:
        """Compare slots and pages with those of all sequences that may hold some; AssertionError on a difference. O(pages): for
        tests."""
        seqs = list(seqs)
        self.pool.check(seq.block_table for seq in seqs)
        for seq in seqs:
            seq.check(self.pool.page_size)
            assert (seq in self.leaving) == (seq.state is not State.RUNNING and seq.in_flight > 0)
        slots = [seq.slot for seq in seqs if seq.slot is not None]
        assert sorted(slots + self._slots) == list(range(self._all_slots)), "a slot is lost or held twice"
