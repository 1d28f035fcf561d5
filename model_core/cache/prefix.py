"""The prefix index: which page already holds the keys and values of these tokens after that prefix.

Automatic prefix caching as in vLLM (full pages, each known by its parent and its own tokens). One difference: a parent
is named by an id that is never given twice instead of by a hash of its contents, and the tokens themselves are part
of the key. Two prefixes are thus the same entry only if every token of them is equal, so that no hash collision,
made by accident or by a client, can hand out another conversation's pages.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Node:
    """One indexed page: the prefix that ends with it. `parent` is the id of the prefix before it.

    A root stands for no page (-1); its `tokens` are the salt, if any, of all that is indexed under it.
    """

    id: int
    parent: int
    tokens: bytes
    page: int


class PrefixIndex:
    """Full pages by (parent prefix, tokens of the page). Holds no reference to a page; the pool asks it and tells it.

    An entry whose parent was evicted first can never match again (the parent's id is gone). The pool releases the
    last page of a sequence first, so this happens only to a page computed by two sequences at the same time; it
    then leaves by age like any other.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.root = Node(id=0, parent=-1, tokens=b"", page=-1)
        self._last_id = 0
        self._nodes: dict[tuple[int, bytes], Node] = {}
        self._by_page: dict[int, Node] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, page: int) -> bool:
        return page in self._by_page

    def match(self, tokens: Sequence[int], salt: bytes = b"") -> tuple[list[int], Node]:
        """Pages of the longest prefix of `tokens` indexed under `salt`, and the node to index what follows under.

        At most len(tokens) - 1 tokens match: the last one must be computed, or there would be no logits.
        """
        size, nodes, pages = self.page_size, self._nodes, []
        node = Node(id=0, parent=-1, tokens=salt, page=-1) if salt else self.root
        for end in range(size, len(tokens), size):
            found = nodes.get(_key(node, tokens[end - size : end]))
            if found is None:
                break
            node = found
            pages.append(node.page)
        return pages, node

    def insert(self, parent: Node, tokens: Sequence[int], page: int) -> Node | None:
        """Index `page`, which holds the page_size `tokens` after `parent`.

        Returns the node to index what follows under. If those tokens are indexed already (two sequences computed
        them at once), the first page stays indexed and `page` remains its sequence's own. None if the parent has
        been evicted meanwhile.
        """
        assert len(tokens) == self.page_size
        if parent.page >= 0 and self._by_page.get(parent.page) is not parent:
            return None
        key = _key(parent, tokens)
        node = self._nodes.get(key)
        if node is None:
            assert page not in self._by_page, f"page {page} is indexed already"
            self._last_id += 1
            node = self._nodes[key] = self._by_page[page] = Node(self._last_id, *key, page)
        return node

    def remove(self, page: int) -> None:
        """Forget an indexed page (its contents are about to be overwritten)."""
        node = self._by_page.pop(page)
        del self._nodes[node.parent, node.tokens]


def _key(parent: Node, tokens: Sequence[int]) -> tuple[int, bytes]:
    """A first page's key holds the salt as well, so that different salts never meet: the tokens have a fixed length."""
    return parent.id, _pack(tokens) if parent.page >= 0 else _pack(tokens) + parent.tokens


def _pack(tokens: Sequence[int]) -> bytes:
    """Token ids as bytes: a third of the memory of a tuple, and hashed with Python's secret key."""
    return array("I", tokens).tobytes()
