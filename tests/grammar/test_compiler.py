"""The compiler's bounds: time, memory, what it keeps; and that its process is gone with it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from benchmarks.texts import made_up
from model_core.errors import CheckpointError, RequestError
from model_core.grammar.calls import Block, Call, Control, of_answer_or_calls
from model_core.grammar.compiler import Compiler
from model_core.grammar.matcher import Vocabulary
from model_core.grammar.spec import GrammarSpec, of_choice, of_json_object, of_regex
from tests.grammar.walks import SPECIAL, VOCABULARY, accepts


@pytest.fixture
def compiler() -> Iterator[Compiler]:
    made = Compiler(lambda: VOCABULARY, cache_count=3)
    yield made
    made.close()


def test_what_is_kept(compiler: Compiler) -> None:
    specs = [of_choice([str(i)], "x") for i in range(5)]
    first = compiler.get(specs[0])
    assert accepts(first, "0") and not accepts(first, "1")
    assert compiler.get(GrammarSpec(specs[0].text, "another field")) is first
    for spec in specs:
        compiler.get(spec)
    assert compiler.get(specs[4]) is compiler.get(specs[4])
    assert compiler.get(specs[0]) is not first  # used longest ago


def test_control_tokens_and_what_must_be_told_apart(compiler: Compiler) -> None:
    block = Block((Call("[", {"type": "integer"}, "]"),), "<call>", control=(Control(SPECIAL, "<call>"),))
    grammar = compiler.get(of_answer_or_calls(of_choice(["yes"], "x"), block, "tools"))
    assert accepts(grammar, SPECIAL, "[3]") and accepts(grammar, "yes") and not accepts(grammar, "<call>[3]")
    with pytest.raises(RequestError, match="tell them apart"):
        compiler.get(of_answer_or_calls(of_choice(["<call>[x"], "x"), block, "tools"))


def test_what_walks_find_slow_stays_slow(compiler: Compiler) -> None:
    """It comes back from the process. Vocabularies in tests are too small to make a mask slow."""
    assert compiler.get(of_regex("[ab]{600}", "x")).slow and not compiler.get(of_regex("[ab]{6}", "x")).slow
    made = Compiler(lambda: Vocabulary(made_up(64_000), 64_000, [0]))
    try:
        words = GrammarSpec('root ::= (word " ")*\nword ::= [a-z]{1,5}', "x")
        assert made.get(words).slow and not made.get(of_json_object("x")).slow
    finally:
        made.close()


def test_many_at_once(compiler: Compiler) -> None:
    found: list[object] = []
    spec = of_regex("[ab]{3}", "x")
    threads = [threading.Thread(target=lambda: found.append(compiler.get(spec))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(map(id, found))) == 1


def test_a_wrong_grammar_hurts_nobody(compiler: Compiler) -> None:
    with pytest.raises(RequestError, match="structured_outputs.grammar"):
        compiler.get(GrammarSpec("root ::= nothing", "structured_outputs.grammar"))
    assert accepts(compiler.get(of_choice(["a"], "x")), "a")


def test_one_that_takes_too_long_is_refused_and_the_next_one_is_not() -> None:
    compiler = Compiler(lambda: VOCABULARY, timeout_s=2.5)
    try:
        slow = GrammarSpec("root ::= " + "[a-z]? " * 3000, "structured_outputs.grammar")
        began = time.monotonic()
        with pytest.raises(RequestError, match=r"takes more than 2\.5 s") as caught:
            compiler.get(slow)
        assert time.monotonic() - began < 10
        assert caught.value.param == "structured_outputs.grammar" and caught.value.code == "grammar_too_complex"
        assert accepts(compiler.get(of_choice(["a"], "x")), "a")
    finally:
        compiler.close()


def test_one_that_would_stop_the_engine_at_each_token_is_refused() -> None:
    vocabulary = Vocabulary(made_up(32_000), 32_000, [0])
    slow = Compiler(lambda: vocabulary)
    try:
        with pytest.raises(RequestError, match="a token to follow") as caught:
            slow.get(of_regex(r"(\w+ ?){1,20}", "structured_outputs.regex"))
        assert caught.value.code == "grammar_too_complex" and caught.value.param == "structured_outputs.regex"
    finally:
        slow.close()


def test_tokens_may_be_loaded_before_the_first_grammar() -> None:
    loaded = []
    compiler = Compiler(lambda: (loaded.append(1), VOCABULARY)[1])
    compiler.prepare()
    compiler.prepare()
    assert loaded == [1] and compiler._worker is None
    assert accepts(compiler.get(of_choice(["a"], "x")), "a") and loaded == [1]
    compiler.close()


def test_a_model_without_a_tokenizer() -> None:
    def missing() -> None:
        raise CheckpointError("there is no tokenizer.json")

    compiler = Compiler(missing)  # type: ignore[arg-type]
    compiler.prepare()  # nobody has asked
    with pytest.raises(RequestError, match="cannot be constrained: there is no tokenizer.json"):
        compiler.get(of_choice(["a"], "x"))


def test_neither_transformers_nor_the_package_itself_is_imported() -> None:
    code = ("import sys, model_core.grammar.matcher; "
            "sys.exit(' '.join({'transformers', 'xgrammar', 'tokenizers'} & set(sys.modules)) or 0)")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
