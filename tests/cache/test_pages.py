"""The page pool: states of pages, eviction order, and thousands of random operations against a plain model."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from model_core.cache.pages import PagePool
from model_core.errors import ConfigError


def index(pool: PagePool, table: list[int], tokens: list[int]) -> None:
    """Index every full page of a table that holds these tokens."""
    node = pool.match([])[1]
    for i, page in enumerate(table[: len(tokens) // pool.page_size]):
        node = pool.insert(node, tokens[i * pool.page_size : (i + 1) * pool.page_size], page)


def test_counts_follow_a_page_through_its_states() -> None:
    pool = PagePool(5, 2)
    assert (pool.free, pool.used, pool.cached, pool.capacity) == (4, 0, 0, 4)
    table = pool.allocate(2)
    assert table == [1, 2]
    assert (pool.free, pool.used, pool.cached) == (2, 2, 0)
    index(pool, table, [7, 8, 9])  # one full page, one half
    pool.release(table)
    assert (pool.free, pool.used, pool.cached, pool.available) == (3, 0, 1, 4)
    hits, _ = pool.match([7, 8, 9])
    assert hits == [1] and pool.cost(hits) == 1
    pool.acquire(hits)
    assert (pool.free, pool.used, pool.cached) == (3, 1, 0) and pool.cost(hits) == 0
    pool.check([hits])


def test_allocation_is_all_or_nothing() -> None:
    pool = PagePool(4, 1)
    assert pool.allocate(4) is None and pool.free == 3
    assert pool.allocate(0) == []
    assert sorted(pool.allocate(3)) == [1, 2, 3], "every page but the dump page can be used"
    assert pool.allocate(1) is None


def test_released_tables_are_handed_out_in_ascending_order_again() -> None:
    pool = PagePool(10, 4)
    first, second = pool.allocate(4), pool.allocate(3)
    pool.release(first)
    assert pool.allocate(4) == first
    pool.check([first, second])


def test_free_pages_go_before_cached_ones_and_the_oldest_prefix_loses_its_end_first() -> None:
    pool = PagePool(7, 1)
    old, new = pool.allocate(2), pool.allocate(2)
    index(pool, old, [1, 2])
    index(pool, new, [3, 4])
    pool.release(old)
    pool.release(new)
    assert set(pool.allocate(2)) == {5, 6}
    assert pool.allocate(1) == [old[1]]
    assert pool.match([1, 2, 0])[0] == [old[0]], "what is left of the prefix is still found"
    pool.acquire([old[0]])
    pool.release([old[0]])  # used again, so now the youngest
    assert pool.allocate(3) == [new[1], new[0], old[0]]
    assert pool.match([1, 2, 0])[0] == [] and len(pool.index) == 0


def test_a_shared_page_outlives_one_of_its_tables() -> None:
    pool = PagePool(4, 1)
    table = pool.allocate(2)
    index(pool, table, [1, 2])
    pool.acquire(table[:1])
    other = table[:1]
    assert pool.exclusive(table) == 1
    pool.release(table)
    assert pool.allocate(3) is None and pool.available == 2, "the shared page cannot be evicted"
    pool.check([other])


def test_without_prefix_cache_nothing_is_kept() -> None:
    pool = PagePool(4, 1, prefix_cache=False)
    table = pool.allocate(2)
    assert pool.match([1, 2]) == ([], None) and pool.insert(None, [1], table[0]) is None
    pool.release(table)
    assert (pool.free, pool.cached) == (3, 0)


@pytest.mark.parametrize("damage", [
    lambda pool, table: pool._free.append(table[0]),
    lambda pool, table: pool._free.pop(),
    lambda pool, table: pool._refs.__setitem__(table[0], 2),
    lambda pool, table: pool._cached.__setitem__(table[1], None),
    lambda pool, table: pool._cached.__setitem__(pool._free.pop(), None),
    lambda pool, table: table.append(0),
    lambda pool, table: table.append(table[0]),
    lambda pool, table: table.pop(),
])
def test_check_finds_damage(damage) -> None:
    pool = PagePool(6, 1)
    table = pool.allocate(3)
    index(pool, table, [1, 2, 3])
    pool.check([table])
    damage(pool, table)
    with pytest.raises(AssertionError):
        pool.check([table])


def test_misuse_is_an_error() -> None:
    pool = PagePool(4, 1)
    table = pool.allocate(1)
    pool.release(table)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(table)
    with pytest.raises(ConfigError, match="needs at least 2"):
        PagePool(1, 16)
    with pytest.raises(ConfigError, match="page_size"):
        PagePool(4, 0)


def test_100k_random_rounds_lose_no_page() -> None:
    """After the allocator fuzz test of Hugging Face TGI: allocate and free at random, compare the counts each round."""
    rng, pool = random.Random(1), PagePool(200, 4)
    tables: list[list[int]] = []
    owned = 0
    for round_ in range(100_000):
        if rng.random() < 0.5:
            wanted = rng.randrange(1, 12)
            pages = pool.allocate(wanted)
            assert (pages is None) == (wanted > 199 - owned)
            if pages is not None:
                tables.append(pages)
                owned += wanted
                if round_ % 3 == 0:
                    index(pool, pages, [rng.randrange(4) for _ in range(4 * wanted)])
        elif tables:
            last = rng.randrange(len(tables))
            tables[last], tables[-1] = tables[-1], tables[last]
            pages = tables.pop()
            owned -= len(pages)
            pool.release(pages)
        assert pool.used == owned and pool.available == 199 - owned
        if round_ % 1000 == 0:
            pool.check(tables)
    pool.check(tables)


class PoolMachine(RuleBasedStateMachine):
    """Tables of sequences over two token ids, and for each page the whole prefix that its contents depend on."""

    @initialize(pages=st.integers(2, 40), size=st.integers(1, 3))
    def build(self, pages: int, size: int) -> None:
        self.pool = PagePool(pages, size)
        self.tables: list[list[int]] = []
        self.contents: dict[int, tuple[int, ...]] = {}

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=24))
    def compute(self, tokens: list[int]) -> None:
        """What a scheduler does with a prompt: reuse, allocate, write, index."""
        pool, size = self.pool, self.pool.page_size
        hits, node = pool.match(tokens)
        assert len(hits) * size < len(tokens)
        for i, page in enumerate(hits):
            assert self.contents[page] == tuple(tokens[: (i + 1) * size]), "another prefix's page was found"
        missing, before = pool.pages_for(len(tokens)) - len(hits), pool.available
        if missing + pool.cost(hits) > before:
            return
        pool.acquire(hits)
        table = hits + pool.allocate(missing)
        for i in range(len(hits), len(tokens) // size):
            self.contents[table[i]] = tuple(tokens[: (i + 1) * size])
            node = pool.insert(node, tokens[i * size : (i + 1) * size], table[i])
        self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data) -> None:
        self.pool.release(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data) -> None:
        """A second table on the same full pages, as a prefix hit makes it."""
        table = data.draw(st.sampled_from(self.tables))
        self.pool.acquire(table)
        self.tables.append(list(table))

    @invariant()
    def ownership(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check(self.tables)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
