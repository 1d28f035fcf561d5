"""The prefix index alone."""

import random

import pytest

from model_core.cache.prefix import PrefixIndex


def insert_all(index: PrefixIndex, tokens: list[int], pages: list[int]) -> None:
    node = index.root
    for i, page in enumerate(pages):
        node = index.insert(node, tokens[i * index.page_size : (i + 1) * index.page_size], page)
        assert node is not None


def test_longest_prefix_in_full_pages_and_never_the_whole() -> None:
    index = PrefixIndex(2)
    insert_all(index, [1, 2, 3, 4, 5, 6], [10, 11, 12])
    assert index.match([1, 2, 3, 4, 5, 6, 7])[0] == [10, 11, 12]
    assert index.match([1, 2, 3, 4, 5, 6])[0] == [10, 11], "the last token must be computed"
    assert index.match([1, 2, 3, 4, 5])[0] == [10, 11]
    assert index.match([1, 2, 3])[0] == [10]
    assert index.match([1, 2, 9, 4, 5])[0] == [10]
    assert index.match([9, 2, 3, 4])[0] == []
    assert index.match([3, 4, 5])[0] == [], "the same tokens at another place are another prefix"
    assert index.match([1, 2])[0] == index.match([1])[0] == index.match([])[0] == []


def test_the_first_of_two_equal_pages_stays_and_the_chain_goes_on() -> None:
    index = PrefixIndex(1)
    insert_all(index, [1], [10])
    insert_all(index, [1, 2], [20, 21])
    assert index.match([1, 2, 3])[0] == [10, 21]
    assert 20 not in index and 21 in index and len(index) == 2


def test_nothing_is_indexed_below_an_evicted_parent() -> None:
    index = PrefixIndex(1)
    parent = index.insert(index.root, [1], 10)
    index.remove(10)
    assert index.insert(parent, [2], 11) is None and len(index) == 0
    index.insert(index.root, [1], 12)
    assert index.insert(parent, [2], 11) is None, "the same tokens again are a new prefix"
    assert index.match([1, 2, 3])[0] == [12]


def test_a_child_of_an_evicted_parent_is_not_found_until_it_is_computed_again() -> None:
    index = PrefixIndex(1)
    insert_all(index, [1, 2], [10, 11])
    index.remove(10)
    assert index.match([1, 2, 3])[0] == []
    insert_all(index, [1, 2], [20, 21])
    assert index.match([1, 2, 3])[0] == [20, 21]
    index.remove(11)
    assert index.match([1, 2, 3])[0] == [20, 21] and len(index) == 2


def test_a_page_has_one_entry() -> None:
    index = PrefixIndex(1)
    insert_all(index, [1], [10])
    with pytest.raises(AssertionError, match="indexed already"):
        index.insert(index.root, [2], 10)


def test_ids_of_four_bytes_do_not_run_into_each_other() -> None:
    index = PrefixIndex(2)
    insert_all(index, [1, 2**32 - 1], [10])
    assert index.match([1, 2**32 - 1, 0])[0] == [10]
    assert index.match([2**16, 1, 0])[0] == []


def test_agrees_with_a_search_through_all_prefixes() -> None:
    rng, index = random.Random(2), PrefixIndex(3)
    known: dict[tuple[int, ...], int] = {}
    for page in range(1, 400):
        tokens = [rng.randrange(2) for _ in range(3 * rng.randrange(1, 6))]
        pages, node = index.match([*tokens, 0])
        expected = []
        while (prefix := tuple(tokens[: 3 * (len(expected) + 1)])) in known and len(prefix) == 3 * (len(expected) + 1):
            expected.append(known[prefix])
        assert pages == expected
        end = 3 * len(pages)
        if end < len(tokens):
            index.insert(node, tokens[end : end + 3], page)
            known[tuple(tokens[: end + 3])] = page


def test_salts_never_meet() -> None:
    index = PrefixIndex(2)
    tokens = [1, 2, 3, 4, 5]
    for salt, pages in ((b"", [10, 11]), (b"a", [20, 21]), (b"ab", [30, 31])):
        node = index.match(tokens, salt)[1]
        assert node is not None and index.match(tokens, salt)[0] == [], salt
        for i, page in enumerate(pages):
            node = index.insert(node, tokens[2 * i : 2 * i + 2], page)
            assert node is not None
    for salt, pages in ((b"", [10, 11]), (b"a", [20, 21]), (b"ab", [30, 31]), (b"b", [])):
        assert index.match(tokens, salt)[0] == pages
    index.remove(20)
    assert index.match(tokens, b"a")[0] == [] and index.match(tokens)[0] == [10, 11]
