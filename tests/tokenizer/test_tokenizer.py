"""Ids and text against the libraries that define them."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from model_core.errors import RequestError
from model_core.tokenizer import Tokenizer

TRICKY = ["", " ", "  a", "a  ", "\n\n7", "a  3", "½ ² Ⅷ", "don't DON'T", "1234567", "\t\tx", "\x00", "a\x00b", "é́", "👩‍👩‍👧",
          "\u200b", "▁x", "<0x0A>", "日本語 text", "\r\n\r\n", "<s>", "</s>x", "<|im_end|>", "<tool_call>f</tool_call>",
          "￿", "\U0010ffff", "a" * 300, " " * 300]
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.sampled_from(TRICKY)
slow_start = settings(deadline=None, max_examples=150)


@slow_start
@given(text=texts)
def test_byte_level_equals_tokenizers(text: str, bpe: Tokenizer, bpe_dir: Path) -> None:
    oracle = tokenizers.Tokenizer.from_file(str(bpe_dir / "tokenizer.json")) if not _oracles else _oracles[0]
    _oracles[:] = [oracle]
    assert bpe.encode(text, allow_special=True) == oracle.encode(text).ids
    assert bpe.encode(text, add_special_tokens=False, allow_special=True) == oracle.encode(
        text, add_special_tokens=False).ids


_oracles: list[tokenizers.Tokenizer] = []


@slow_start
@given(ids=st.lists(st.integers(0, 703), max_size=40), skip=st.booleans())
def test_byte_level_decode_equals_tokenizers(ids: list[int], skip: bool, bpe: Tokenizer, bpe_dir: Path) -> None:
    oracle = tokenizers.Tokenizer.from_file(str(bpe_dir / "tokenizer.json"))
    assert bpe.decode(ids, skip_special_tokens=skip) == oracle.decode(ids, skip_special_tokens=skip)


@slow_start
@given(text=texts)
def test_sentencepiece_equals_sentencepiece(text: str, spm: Tokenizer, spm_dir: Path) -> None:
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(spm_dir / "tokenizer.model"))
    ids = oracle.encode(text)
    assert spm.encode(text, add_special_tokens=False) == ids
    assert spm.encode(text) == [oracle.bos_id(), *ids]
    assert spm.decode(ids) == oracle.decode(ids)


@slow_start
@given(text=texts)
def test_llama_tokenizer_json_equals_tokenizers_and_sentencepiece(
    text: str, llama_json: Tokenizer, llama_json_dir: Path, spm: Tokenizer
) -> None:
    oracle = tokenizers.Tokenizer.from_file(str(llama_json_dir / "tokenizer.json"))
    ids = llama_json.encode(text, allow_special=True)
    assert ids == oracle.encode(text).ids
    assert llama_json.decode(ids) == oracle.decode(ids)
    assert llama_json.encode(text) == spm.encode(text)


def test_special_tokens_keep_the_prefix_rules_of_tokenizers(llama_json: Tokenizer, llama_json_dir: Path) -> None:
    oracle = tokenizers.Tokenizer.from_file(str(llama_json_dir / "tokenizer.json"))
    for text in ("<s>hi</s>\nthere", "hi</s>", "</s> a</s></s>b", " <s> ", "x<unk>y"):
        assert llama_json.encode(text, allow_special=True) == oracle.encode(text).ids, text


@pytest.mark.parametrize("text", ["a <|wide|> b", "<|wide|>  <|wide|>", "  <|wide|>\n\nx", "<|wide|> <|im_end|> y"])
def test_tokens_that_take_white_space(text: str, bpe: Tokenizer, bpe_dir: Path) -> None:
    oracle = tokenizers.Tokenizer.from_file(str(bpe_dir / "tokenizer.json"))
    assert bpe.encode(text, allow_special=True) == oracle.encode(text).ids


def test_metaspace_first_puts_no_space_after_a_control_token(llama_json_dir: Path, tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    from model_core.tokenizer import load_tokenizer

    oracle = tokenizers.Tokenizer.from_file(str(llama_json_dir / "tokenizer.json"))
    oracle.normalizer = None
    oracle.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    oracle.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    for text in ("the fox", "</s>the fox", "the</s>fox", "<s> the"):
        assert ours.encode(text, allow_special=True) == oracle.encode(text).ids, text


def test_sentencepiece_new_manner_puts_no_space_after_a_control_token(spm_dir: Path, tmp_path: Path) -> None:
    from model_core.tokenizer import load_tokenizer

    (tmp_path / "tokenizer.model").write_bytes((spm_dir / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": false}')
    ours, oracle = load_tokenizer(tmp_path), sentencepiece.SentencePieceProcessor(
        model_file=str(spm_dir / "tokenizer.model"))
    got = ours.encode("the</s>fox", allow_special=True, add_special_tokens=False)
    assert oracle.id_to_piece(got)[0].startswith("▁") and not oracle.id_to_piece(got[got.index(2) + 1]).startswith("▁")
    assert ours.encode("the fox", add_special_tokens=False) == oracle.encode("the fox")


def test_added_tokens_beyond_the_sentencepiece_model(spm_dir: Path, tmp_path: Path) -> None:
    from model_core.tokenizer import load_tokenizer

    (tmp_path / "tokenizer.model").write_bytes((spm_dir / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(
        '{"eos_token": "<|im_end|>", "add_bos_token": false, "added_tokens_decoder": {"600": {"content": "<|im_end|>", '
        '"special": true}, "602": {"content": "<think>", "special": false}}}')
    ours = load_tokenizer(tmp_path)
    assert ours.vocab_size == 603 and ours.eos_ids == (600,) and 600 in ours.special_ids
    assert ours.encode("<|im_end|>", allow_special=True) == [600]
    assert 600 not in ours.encode("<|im_end|>") and ours.encode("a<think>")[-1] == 602
    assert ours.decode([602, 601, 600]) == "<think>"


def test_special_text_is_plain_unless_asked(tokenizer: Tokenizer) -> None:
    for i in tokenizer.special_ids:
        text = tokenizer.token_text(i)
        plain = tokenizer.encode(text, add_special_tokens=False)
        assert not tokenizer.special_ids & set(plain), text
        assert tokenizer.decode(plain) == text
        assert i in tokenizer.encode(text, add_special_tokens=False, allow_special=True)


def test_smollm2_facts(smollm2: Tokenizer) -> None:
    assert (smollm2.vocab_size, smollm2.bos_id, smollm2.eos_ids[0], len(smollm2.special_ids)) == (49152, 1, 2, 17)
    assert smollm2.encode("a  3") == [81, 256, 35]  # digits stand alone
    # 21 bytes have no symbol; they vanish, as in the tokenizers library
    assert smollm2.decode(smollm2.encode("\x01\x02\x04\x06\x13")) == "\x01\x02"


@slow_start
@given(text=texts)
def test_smollm2_splits_as_its_tokenizer_json_does(text: str, smollm2: Tokenizer) -> None:
    from tokenizers import Regex, pre_tokenizers

    from model_core.tokenizer.bpe import PRE_TOKENIZERS

    published = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    ours = pre_tokenizers.Sequence([
        *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS["smollm"]),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    assert ours.pre_tokenize_str(text) == published.pre_tokenize_str(text)


def test_token_bytes_rebuild_the_text(tokenizer: Tokenizer) -> None:
    text = "The quick brown fox, 数字 🎉 and 12 more."
    ids = tokenizer.encode(text, add_special_tokens=False)
    joined = b"".join(tokenizer.token_bytes(i) for i in ids)
    assert joined.removeprefix(b" ").decode() == text
    assert any("\ufffd" in tokenizer.token_text(i) for i in ids)  # the emoji is cut into bytes


def test_ids_outside_the_vocabulary(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.decode([*ids, tokenizer.vocab_size, 10**9]) == "hello"
    assert tokenizer.token_bytes(tokenizer.vocab_size) == tokenizer.token_bytes(-1) == b""
    with pytest.raises(RequestError, match="negative"):
        tokenizer.decode([-1])


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff", "é" * 10 + "\ud83d"])
def test_lone_surrogates_are_refused(text: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="surrogate"):
        tokenizer.encode(text)
    with pytest.raises(RequestError, match="surrogate"):
        tokenizer.encode_chat([{"role": "user", "content": text}])


@pytest.mark.parametrize("unit", [" ", "a", "\n", " \n", "<|im_", "<", "1", "\u200b"])
def test_time_is_linear_in_the_text(unit: str, tokenizer: Tokenizer) -> None:
    # Quadratic behaviour of any part would take minutes on 200,000 characters; linear takes 0.5 s at most.
    text = unit * (200_000 // len(unit)) + "x"
    start = time.perf_counter()
    ids = tokenizer.encode(text, allow_special=True, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert time.perf_counter() - start < 10


def test_nothing_heavy_is_imported() -> None:
    code = ("import sys; from model_core.tokenizer import Detokenizer, load_tokenizer; "
            "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'ray', 'triton')))")
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
