"""Streams of ids against decode of all of them: every cut, every stop string, every prompt."""

from __future__ import annotations

import codecs
import time
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model_core.errors import RequestError
from model_core.tokenizer import Detokenizer, Tokenizer
from model_core.tokenizer.tokenizer import Codec

SNIPPETS = ["The quick brown fox", " dog", "a", "aa", "ab", "aab", " ", "  ", "\n\n", "日本語", "ё", "👩‍👩‍👧", "�", "é́",
            "<|im_end|>", "</s>", "12 %"]  # fmt: skip
STOPS = ["a", "ab", "aab", "ba", "aaaa", " ", "\n", "\n\n", "o", "fox", "x d", "語", "本語", "\u200d", "👧", "�", "��", "�a",
         "<|", ">"]  # fmt: skip
many = settings(deadline=None, max_examples=250, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module", params=["bpe", "spm", "llama_json", "smollm2"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def ids_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Texts as the model would write them, mixed with any id, control tokens, parts of characters and padded rows."""
    size = tokenizer.vocab_size
    parts = [i for i in range(size) if "\ufffd" in tokenizer.token_text(i)]
    texts = [tokenizer.encode(text, add_special_tokens=False, allow_special=True) for text in SNIPPETS]
    one = st.integers(0, size + 1) | st.sampled_from(parts) | st.sampled_from(sorted(tokenizer.special_ids))
    return st.lists(st.sampled_from(texts) | one.map(lambda i: [i]), max_size=8).map(lambda found: sum(found, []))


def settled(tokenizer: Tokenizer, ids: Sequence[int], skip: bool) -> tuple[str, bool]:
    """The text of `ids` that no further id changes, and whether bytes of an incomplete character follow it."""
    table = tokenizer.byte_table(skip_special_tokens=skip)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(b"".join(table[i] for i in ids if i < len(table)))
    return text.removeprefix(" ") if tokenizer.strips_space else text, decoder.getstate()[0] != b""


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """(end, stop string) of the one that ends first, of two that end together the longer."""
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    return (min(found)[0], min(found)[2]) if found else None


def sendable(text: str, stops: Sequence[str], include: bool) -> str:
    """All of `text` that is sent before more is known."""
    if found := first_stop(text, stops):
        return text[: found[0] if include else found[0] - len(found[1])]
    if include:
        return text
    partial = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return text[: len(text) - max(partial, default=0)]


@many
@given(data=st.data(), skip=st.booleans(), include=st.booleans())
def test_any_cut_with_any_stops_and_any_prompt_sends_what_decode_gives(
    data: st.DataObject, skip: bool, include: bool, tokenizer: Tokenizer, ids_of: st.SearchStrategy[list[int]]
) -> None:
    prompt, ids = data.draw(ids_of | st.just([]), "prompt"), data.draw(ids_of, "ids")
    before = len(settled(tokenizer, prompt, skip)[0])
    full = tokenizer.decode([*prompt, *ids], skip_special_tokens=skip)[before:]
    if not data.draw(st.booleans(), "stops"):
        stops: list[str] = []
    else:
        spans = st.tuples(st.integers(0, max(len(full) - 1, 0)), st.integers(1, 4)).map(lambda s: full[s[0] : sum(s)] or "a")
        stops = data.draw(st.lists(st.sampled_from(STOPS) | spans, min_size=1, max_size=4), "stops")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=len(ids) + 1), "cuts"))

    stream = Detokenizer(tokenizer, stop=stops, include_stop=include, skip_special_tokens=skip, prompt_ids=prompt)
    sent, ends, last = "", [], 0  # ends: characters that are out once all text of a token is
    for cut in [*cuts, len(ids)]:
        for n in range(last, cut):
            text, half = settled(tokenizer, [*prompt, *ids[: n + 1]], skip)
            if not first_stop(settled(tokenizer, [*prompt, *ids[:n]], skip)[0][before:], stops):
                ends.append(len(text) - before + half)
        sent += stream.push(ids[last:cut])
        last = cut
        text = settled(tokenizer, [*prompt, *ids[:cut]], skip)[0][before:]
        assert sent == sendable(text, stops, include)
        check_counts(stream, sent, ends, cut, found=first_stop(text, stops))
    sent += stream.finish()
    found = first_stop(full, stops)
    assert sent == (sendable(full, stops, include) if found else full)
    assert stream.stopped == (found[1] if found else None)
    check_counts(stream, sent, ends, len(ids), found)
    assert found or stream.tokens_sent == len(ids)
    assert stream.finish() == ""


def check_counts(stream: Detokenizer, sent: str, ends: list[int], pushed: int, found: tuple[int, str] | None) -> None:
    assert stream.tokens_pushed == pushed
    assert (stream.stopped is None) == (found is None)
    whole = sum(end <= len(sent) for end in ends)
    shared = found and whole < len(ends) and (ends[whole - 1] if whole else 0) < len(sent)  # text and stop in one token
    assert stream.tokens_sent == whole + bool(shared)


@many
@given(data=st.data(), stops=st.lists(st.text("ab", min_size=1, max_size=10), min_size=1, max_size=3))
def test_stop_strings_among_their_own_beginnings_do_not_depend_on_the_tokens(
    data: st.DataObject, stops: list[str], bpe: Tokenizer
) -> None:
    beginnings = st.tuples(st.sampled_from(stops), st.integers(1, 10)).map(lambda pair: pair[0][: pair[1]])
    text = "".join(data.draw(st.lists(beginnings, max_size=8)))
    cuts = sorted({0, len(text), *data.draw(st.lists(st.integers(0, len(text)), max_size=8))})
    pieces = [bpe.encode(text[a:b], add_special_tokens=False) for a, b in zip(cuts, cuts[1:], strict=False)]
    stream = Detokenizer(bpe, stop=stops)
    sent = "".join([*map(stream.push, pieces), stream.finish()])
    end, stop = first_stop(text, stops) or (len(text), None)
    assert (sent, stream.stopped) == (text[: end - len(stop or "")], stop)


# --- the rules one at a time, on texts that a person can follow


def byte_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """`text` one byte a token."""
    table = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    return [len(table) - 1 - table[::-1].index(bytes([byte])) for byte in text.encode()]


def pushes(stream: Detokenizer, ids: Sequence[int]) -> list[str]:
    return [stream.push([i]) for i in ids]


def test_a_character_is_sent_once_all_its_bytes_are_there(tokenizer: Tokenizer) -> None:
    stream = Detokenizer(tokenizer)
    assert pushes(stream, byte_ids(tokenizer, "é🎉")) == ["", "é", "", "", "", "🎉"]
    assert (stream.finish(), stream.tokens_sent) == ("", 6)


def test_broken_characters_become_replacement_characters(tokenizer: Tokenizer) -> None:
    party = byte_ids(tokenizer, "🎉")
    stream = Detokenizer(tokenizer)
    ids = [*party[:3], *byte_ids(tokenizer, "x"), party[1], *party[:2]]
    assert pushes(stream, ids) == ["", "", "", "\ufffdx", "\ufffd", "", ""]
    assert (stream.tokens_sent, stream.finish(), stream.tokens_sent) == (5, "\ufffd", 7)


def test_half_a_character_at_the_end_of_the_prompt_is_completed(tokenizer: Tokenizer) -> None:
    ids = byte_ids(tokenizer, "a🎉b")
    for cut in range(2, 5):
        assert "".join(pushes(Detokenizer(tokenizer, prompt_ids=ids[:cut]), ids[cut:])) == "🎉b"
    assert Detokenizer(tokenizer, prompt_ids=ids[:3]).push(byte_ids(tokenizer, "b")) == "\ufffdb"
    assert Detokenizer(tokenizer, prompt_ids=ids[:3]).finish() == "\ufffd"


@pytest.mark.parametrize("name", ["spm", "llama_json"])
def test_one_leading_space_is_dropped_at_the_beginning_of_a_text_only(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode("The fox", add_special_tokens=False)
    two = tokenizer.encode(" ", add_special_tokens=False) + byte_ids(tokenizer, " ")
    assert tokenizer.token_text(ids[0]).startswith(" ")
    assert Detokenizer(tokenizer).push(ids) == "The fox"
    assert Detokenizer(tokenizer, prompt_ids=[tokenizer.bos_id]).push(ids) == "The fox"  # no text before
    assert Detokenizer(tokenizer, prompt_ids=[tokenizer.bos_id], skip_special_tokens=False).push(ids) == " The fox"
    assert Detokenizer(tokenizer, prompt_ids=ids).push(ids) == " The fox"
    stream = Detokenizer(tokenizer)
    assert "".join(pushes(stream, [tokenizer.bos_id, *two, *ids])) == tokenizer.decode([*two, *ids])
    assert Detokenizer(tokenizer, stop=[" The"]).push(ids) == "The fox"  # the space was never text


def test_a_token_of_two_spaces_loses_one() -> None:
    tokenizer = Tokenizer(Codec(encode=lambda text, first: [], token_bytes=[b"  a"], added=[], strips_space=True))
    assert pushes(Detokenizer(tokenizer), [0, 0]) == [" a", "  a"]
    assert tokenizer.decode([0, 0]) == " a  a"


def test_byte_level_models_keep_their_leading_space(bpe: Tokenizer, smollm2: Tokenizer) -> None:
    for tokenizer in (bpe, smollm2):
        assert Detokenizer(tokenizer).push(tokenizer.encode(" the", add_special_tokens=False)) == " the"


def test_the_beginning_of_a_stop_string_waits_until_it_is_decided(bpe: Tokenizer) -> None:
    stream = Detokenizer(bpe, stop=["</s>"])
    assert pushes(stream, byte_ids(bpe, "a<</")) == ["a", "", "<", ""]
    assert (stream.tokens_sent, stream.tokens_pushed) == (2, 4)
    assert stream.push(byte_ids(bpe, "sx")) == "</sx"
    assert stream.push(byte_ids(bpe, "<")) == "" and stream.tokens_sent == 6
    assert stream.finish() == "<" and stream.tokens_sent == 7 and stream.stopped is None


def test_nothing_is_sent_after_a_stop(bpe: Tokenizer) -> None:
    stream = Detokenizer(bpe, stop=["</s>", "never"])
    assert stream.push(byte_ids(bpe, "a</s>b</s>")) == "a"
    assert (stream.stopped, stream.tokens_sent, stream.tokens_pushed) == ("</s>", 1, 10)
    assert stream.push(byte_ids(bpe, "more")) == stream.finish() == ""
    assert (stream.tokens_sent, stream.tokens_pushed) == (1, 14)


def test_the_stop_that_ends_first_wins_and_of_two_that_end_together_the_longer(bpe: Tokenizer) -> None:
    for stops, expected in ((["abcd", "bc"], ("a", "bc")), (["bc", "abc", "c"], ("", "abc")), (["cd", "d"], ("ab", "cd"))):
        for order in (stops, stops[::-1]):
            for ids in ([byte_ids(bpe, "abcd")], [[i] for i in byte_ids(bpe, "abcd")]):
                stream = Detokenizer(bpe, stop=order)
                assert ("".join(map(stream.push, ids)), stream.stopped) == expected


def test_a_stop_string_that_begins_within_its_own_failed_beginning_is_found(bpe: Tokenizer) -> None:
    stream = Detokenizer(bpe, stop=["aabaaaab"])  # of "aabaaa", first "aa" is left, then "aab"
    assert "".join(pushes(stream, byte_ids(bpe, "aabaaabaaaab"))) == "aaba" and stream.stopped


def test_an_included_stop_string_does_not_wait(bpe: Tokenizer) -> None:
    stream = Detokenizer(bpe, stop=["END"], include_stop=True)
    assert pushes(stream, byte_ids(bpe, "aENDb")) == ["a", "E", "N", "D", ""]
    assert (stream.stopped, stream.tokens_sent, stream.tokens_pushed) == ("END", 4, 5)


def test_a_token_of_text_and_stop_counts_and_a_token_of_the_stop_alone_does_not(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("The history", add_special_tokens=False)
    assert [smollm2.token_text(i) for i in ids] == ["The", " history"]
    for stop, text, sent in ((" hi", "The", 1), ("story", "The hi", 2), ("e h", "Th", 1), ("T", "", 0)):
        stream = Detokenizer(smollm2, stop=[stop])
        assert (stream.push(ids), stream.tokens_sent) == (text, sent), stop


def test_a_stop_string_may_be_a_control_token_only_if_those_are_shown(bpe: Tokenizer) -> None:
    ids = bpe.encode("a<|im_end|>b", allow_special=True, add_special_tokens=False)
    assert Detokenizer(bpe, stop=["<|im_end|>"]).push(ids) == "ab"
    assert Detokenizer(bpe, stop=["<|im_end|>"], skip_special_tokens=False).push(ids) == "a"
    assert Detokenizer(bpe, skip_special_tokens=False).push(ids) == "a<|im_end|>b"


def test_ids_past_the_vocabulary_are_tokens_without_text(tokenizer: Tokenizer) -> None:
    stream = Detokenizer(tokenizer, prompt_ids=[tokenizer.vocab_size])
    ids = tokenizer.encode("fox", add_special_tokens=False)
    assert stream.push([tokenizer.vocab_size, *ids, 10**9]) == "fox"
    assert stream.tokens_sent == len(ids) + 2


def test_an_empty_stop_string_is_refused(bpe: Tokenizer) -> None:
    with pytest.raises(RequestError, match="stop string is empty") as caught:
        Detokenizer(bpe, stop=["a", ""])
    assert caught.value.param == "stop"


@pytest.mark.parametrize("stop", [
    [], ["a" * 5000 + "b"], ["ab" * 2000 + "b"], ["b", "aab", "ba"], ["a" * n + "b" for n in range(2, 60)]],
    ids=["none", "run", "period", "short", "many"])
@pytest.mark.parametrize("unit", ["a", "ab"])
def test_time_is_linear_in_the_tokens(stop: list[str], unit: str, bpe: Tokenizer) -> None:
    # The worst stop strings nearly match everywhere. Quadratic work would take minutes on 100,000 tokens.
    ids = byte_ids(bpe, unit) * (100_000 // len(unit))
    text = bpe.decode(ids)
    start = time.perf_counter()
    stream = Detokenizer(bpe, stop=stop, prompt_ids=ids)
    sent = "".join([*pushes(stream, ids), stream.finish()])
    assert time.perf_counter() - start < 20
    assert sent == sendable(text, stop, False) if stream.stopped else sent == text
