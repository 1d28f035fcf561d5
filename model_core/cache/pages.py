"""The page pool: who owns each page of the KV cache. Pure bookkeeping; the tensors belong to the runner."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from model_core.cache.prefix import Node, PrefixIndex
from model_core.errors import ConfigError


class PagePool:
    """Pages 1 .. num_pages - 1, each in exactly one state:

        free        on the free list, contents meaningless
        used        in n >= 1 block tables (reference count n); may be indexed by the prefix cache as well
        cached      in no block table but indexed: found again by prefix, or evicted, least recently used first

    Page 0 is never handed out: it is the dump page, where padded rows of a graph and overruns write.
    Every operation is O(1) a page. Paging follows vLLM's PagedAttention (Kwon et al., SOSP 2023).
    """

    def __init__(self, num_pages: int, page_size: int, *, prefix_cache: bool = True) -> None:
        if num_pages < 2:
            raise ConfigError(f"the KV pool has {num_pages} pages, needs at least 2 (page 0 is the dump page): "
                              "raise kv_cache_bytes")
        if page_size < 1:
            raise ConfigError(f"page_size must be at least 1, got {page_size}")
        self.num_pages = num_pages
        self.page_size = page_size
        self.index = PrefixIndex(page_size) if prefix_cache else None
        self._refs = [0] * num_pages
        # A stack, lowest page on top; tables are released from their end, so what is taken next is again in
        # ascending order (the CPU's attention reads consecutive pages without gathering).
        self._free = list(range(num_pages - 1, 0, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first

    @property
    def capacity(self) -> int:
        """Pages that one sequence could hold at most: all but the dump page."""
        return self.num_pages - 1

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def available(self) -> int:
        """Pages that `allocate` can hand out now: free and cached."""
        return len(self._free) + len(self._cached)

    @property
    def used(self) -> int:
        return self.num_pages - 1 - len(self._free) - len(self._cached)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold the keys and values of `tokens` tokens."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with one reference each, or None (and no change) if fewer are available.

        Free pages go first; then the least recently used cached pages, which the prefix index forgets.
        """
        if count > self.available:
            return None
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._cached.popitem(last=False)
                assert self.index is not None
                self.index.remove(page)
            assert self._refs[page] == 0, f"page {page} is handed out while {self._refs[page]} tables hold it"
            self._refs[page] = 1
            pages.append(page)
        return pages

    def acquire(self, pages: Iterable[int]) -> None:
        """One more reference to each of these used or cached pages (a prefix hit)."""
        for page in pages:
            if self._refs[page] == 0:
                del self._cached[page]
            self._refs[page] += 1

    def release(self, table: Sequence[int]) -> None:
        """Drop a block table's references, last page first, so that eviction shortens prefixes from their end."""
        for page in reversed(table):
            self._refs[page] -= 1
            assert self._refs[page] >= 0, f"page {page} is released more often than it was taken"
            if self._refs[page] == 0:
                if self.index is not None and page in self.index:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def match(self, tokens: Sequence[int], salt: bytes = b"") -> tuple[list[int], Node | None]:
        """Pages of the longest cached prefix (not acquired yet) and the node to `insert` the next page under."""
        return self.index.match(tokens, salt) if self.index is not None else ([], None)

    def insert(self, parent: Node | None, tokens: Sequence[int], page: int) -> Node | None:
        """Index a full page whose keys and values are written. None: nothing can be indexed below (see PrefixIndex)."""
        if self.index is None or parent is None:
            return None
        assert self._refs[page] > 0, f"page {page} is indexed without an owner"
        return self.index.insert(parent, tokens, page)

    def forget(self, table: Iterable[int]) -> None:
        """The prefix index is to lose those pages of a block table that no other one holds."""
        for page in table:
            if self.index is not None and page in self.index and self._refs[page] == 1:
                self.index.remove(page)

    def cost(self, pages: Iterable[int]) -> int:
        """How many of these pages `acquire` would take from the available ones: those that no table holds."""
        return sum(self._refs[page] == 0 for page in pages)

    def exclusive(self, table: Iterable[int]) -> int:
        """How many pages of this block table would become available by releasing it."""
        return sum(self._refs[page] == 1 for page in table)

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Compare every page with all block tables in existence; AssertionError on any difference. O(pages): for tests.

        Duplicates within a table, wrong reference counts, a page in two states or in none, an index entry that
        leads to a free page, and a dump page that someone owns are all found here.
        """
        tables = [list(table) for table in tables]
        for table in tables:
            assert len(set(table)) == len(table), f"a block table names a page twice: {table}"
        refs = Counter(page for table in tables for page in table)
        assert 0 not in refs, "the dump page is in a block table"
        wrong = {page: (self._refs[page], refs[page]) for page in range(self.num_pages)
                 if self._refs[page] != refs[page]}
        assert not wrong, f"page: (references counted, references in tables) {wrong}"
        free, cached, used = set(self._free), set(self._cached), set(refs)
        assert len(free) == len(self._free), "a page is on the free list twice"
        assert not free & cached and not free & used and not cached & used, "a page is in two states"
        assert free | cached | used == set(range(1, self.num_pages)), "a page is lost"
        assert (len(free), len(cached), len(used)) == (self.free, self.cached, self.used)
        if self.index is not None:
            indexed = {page for page in range(self.num_pages) if page in self.index}
            assert len(indexed) == len(self.index)
            assert cached <= indexed and not indexed & free, "the prefix index and the page states differ"
        else:
            assert not cached
