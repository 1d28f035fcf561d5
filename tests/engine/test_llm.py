"""The engine as a library, on a tiny model whose every token has a text and on the real SmolLM2."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from itertools import islice

import pytest
import torch

from benchmarks.random_model import write_model
from model_core.engine.config import EngineConfig
from model_core.engine.llm import LLM, Chunk
from model_core.engine.naive import naive_stream, naive_tokens
from model_core.engine.request import SamplingParams
from model_core.errors import EngineDead, RequestError
from model_core.grammar.spec import of_choice
from tests.engine.served import at_rest
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = EngineConfig(device="cpu", dtype="float32", threads=1, max_seqs=4, kv_cache_bytes=2 << 20)
PROMPTS = ["Once upon a time", "hello, wörld", "x" * 50]
GREEDY = SamplingParams(temperature=0.0, max_tokens=30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model("tiny", tmp_path_factory.mktemp("model") / "tiny", dtype=torch.float32)


@pytest.fixture(scope="module")
def shared(folder):
    with LLM.load(folder, CONFIG) as llm:
        yield llm
    assert not llm.engine.alive


@pytest.fixture
def llm(shared):
    """Every test leaves nothing behind: no sequence, no page in use, no queue."""
    yield shared
    idle(shared)


def idle(llm: LLM) -> None:
    wait_until(lambda: at_rest(llm.engine), 20)
    assert not llm._queues


@pytest.fixture(scope="module")
def real(smollm2_dir):
    with LLM.load(smollm2_dir, EngineConfig(device="cpu", kv_cache_bytes=64 << 20, max_seqs=2)) as llm:
        yield llm


def test_a_batch_of_prompts_in_their_order(llm):
    """Texts and ids; the text is what the tokenizer makes of the ids, as the sequence goes on from the prompt."""
    ids = [llm.encode(prompt) for prompt in PROMPTS]
    found = llm.generate([PROMPTS[0], ids[1], PROMPTS[2]], GREEDY)
    assert len({tuple(one.token_ids) for one in found}) == 3
    for one, prompt in zip(found, ids, strict=True):
        assert (len(one.token_ids), one.finish, one.prompt_tokens) == (30, "length", len(prompt))
        assert one.text == llm.tokenizer.decode(one.token_ids)
        assert one.token_ids == llm.generate([prompt], GREEDY)[0].token_ids


def test_a_single_prompt_is_no_list_of_letters_or_ids(llm):
    (expected,) = llm.generate([PROMPTS[0]], GREEDY)
    for prompt in (PROMPTS[0], llm.encode(PROMPTS[0])):
        (found,) = llm.generate(prompt, GREEDY)
        assert found.token_ids == expected.token_ids and found.prompt_tokens == expected.prompt_tokens
    assert llm.generate([], GREEDY) == []


def test_more_prompts_than_slots(llm):
    prompts = [f"prompt number {number}" for number in range(11)]
    alone = [llm.generate([prompt], GREEDY)[0].token_ids for prompt in prompts]
    assert [one.token_ids for one in llm.generate(prompts, GREEDY)] == alone


def test_params_for_each_prompt(llm):
    params = [SamplingParams(max_tokens=n, temperature=1.0, seed=n, logprobs=n) for n in (1, 2, 3)]
    found = llm.generate(["same"] * 3, params)
    assert [len(one.token_ids) for one in found] == [len(one.logprobs) for one in found] == [1, 2, 3]
    assert [len(entry.top) for entry in found[2].logprobs] == [3, 3, 3]
    assert len(llm.generate(["same"])[0].token_ids) == SamplingParams().max_tokens
    with pytest.raises(RequestError, match="3 prompts but 2"):
        llm.generate(["same"] * 3, params[:2])


def test_the_prefix_cache_is_told_of(llm):
    prompt = "a prompt that is longer than two pages of tokens"
    first, second = (llm.generate([prompt], GREEDY)[0] for _ in range(2))
    assert first.token_ids == second.token_ids
    assert (first.cached_tokens, second.cached_tokens, second.prompt_tokens) == (0, 32, 48)


def test_nothing_runs_if_one_request_can_never_be_served(llm, monkeypatch):
    monkeypatch.setattr(llm.engine, "submit", lambda request: pytest.fail("a request was submitted"))
    for bad in (SamplingParams(max_tokens=10_000), SamplingParams(top_p=2.0), SamplingParams(stop_ids=(512,))):
        with pytest.raises(RequestError):
            llm.generate(["good", "bad"], [GREEDY, bad])
    with pytest.raises(RequestError, match="no tokens"):
        llm.generate(["good", []], GREEDY)
    with pytest.raises(RequestError, match="stop string is empty"):
        llm.generate(["good"], GREEDY, stop=[""])


def test_a_stream_is_the_completion_in_pieces(llm):
    whole = llm.generate([PROMPTS[0]], GREEDY)[0]
    chunks = list(llm.stream(PROMPTS[0], GREEDY))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [chunk.token_ids for chunk in chunks] == [[token] for token in whole.token_ids]
    assert [chunk.finish for chunk in chunks] == [None] * 29 + ["length"]


def test_closing_a_stream_aborts_its_sequence(llm):
    stream = llm.stream(PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=480))
    assert len(list(islice(stream, 3))) == 3
    before = llm.engine.stats()
    stream.close()
    idle(llm)
    assert before.running == 1 and llm.engine.stats().generation_tokens - before.generation_tokens < 400


def test_an_error_in_the_callers_loop_aborts_the_sequence(llm):
    with pytest.raises(ZeroDivisionError):
        for chunk in llm.stream(PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=480)):
            assert len(chunk.token_ids) / 0


def test_a_stop_string_ends_the_text_before_it(llm):
    """Anywhere: within a token, over two, and in the very last token, where nothing is left to abort."""
    whole = llm.generate([PROMPTS[0]], GREEDY)[0]
    texts = [llm.tokenizer.token_text(token) for token in whole.token_ids]
    for number in (4, 11, 29):
        stop = texts[number - 1][-1] + texts[number][:2] if number != 29 else whole.text[-2:]
        found = llm.generate([PROMPTS[0]], GREEDY, stop=["never written", stop])[0]
        assert found.text == whole.text[: whole.text.index(stop)] and found.finish == "stop"
        assert found.token_ids == whole.token_ids[: len(found.token_ids)] and stop in llm.tokenizer.decode(found.token_ids)
        chunks = list(llm.stream(PROMPTS[0], GREEDY, stop=[stop]))
        assert "".join(chunk.text for chunk in chunks) == found.text and chunks[-1].finish == "stop"


def test_a_stop_string_ends_the_sequence_in_the_engine_too(llm):
    long = SamplingParams(temperature=0.0, max_tokens=480)
    before, stop = llm.engine.stats().generation_tokens, llm.generate([PROMPTS[0]], GREEDY)[0].text[8:11]
    assert llm.generate([PROMPTS[0]], long, stop=[stop])[0].finish == "stop"
    idle(llm)
    assert llm.engine.stats().generation_tokens - before < 400


def test_the_beginning_of_a_stop_string_at_the_end_is_text_after_all(llm):
    whole = llm.generate([PROMPTS[0]], GREEDY)[0]
    found = llm.generate([PROMPTS[0]], GREEDY, stop=[whole.text[-2:] + "and more"])[0]
    assert (found.text, found.finish, found.token_ids) == (whole.text, "length", whole.token_ids)


def test_a_stop_token_is_counted_and_not_printed(llm):
    whole = llm.generate([PROMPTS[1]], GREEDY)[0].token_ids
    stop = whole[6]
    kept = whole[: whole.index(stop) + 1]
    found = llm.generate([PROMPTS[1]], SamplingParams(temperature=0.0, max_tokens=30, stop_ids=(stop,)))[0]
    assert (found.token_ids, found.finish, found.text) == (kept, "stop", llm.tokenizer.decode(kept[:-1]))


def test_chat_uses_the_models_template(llm):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert llm.encode_chat(messages) == llm.encode("system: be brief\nuser: hi\nassistant: ")
    assert llm.chat(messages, GREEDY).token_ids == llm.generate([llm.encode_chat(messages)], GREEDY)[0].token_ids


def test_several_threads_share_one_model(llm):
    wanted = {prompt: llm.generate([prompt], GREEDY)[0].text for prompt in PROMPTS}
    found, lock = [], threading.Lock()

    def work(prompt: str) -> None:
        for _ in range(3):
            text = llm.generate([prompt], GREEDY)[0].text
            with lock:
                found.append((prompt, text))

    threads = [threading.Thread(target=work, args=(prompt,)) for prompt in PROMPTS * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 18 and all(text == wanted[prompt] for prompt, text in found)


def test_close_ends_what_still_streams(folder):
    llm = LLM.load(folder, CONFIG)
    stream = llm.stream(PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=480))
    first = next(stream)
    llm.close()
    rest = list(stream)
    assert first.finish is None and rest[-1] == Chunk(rest[-1].text, [], "abort") and len(rest) < 480
    with pytest.raises(EngineDead):
        llm.generate(["late"], GREEDY)


def test_a_failed_request_raises_and_a_dead_engine_does_not_hang(folder, monkeypatch):
    with LLM.load(folder, CONFIG) as llm:
        embed = llm.engine.parts.runner.model.embed
        (token,) = llm.encode("~")
        embed[token] = math.nan
        with pytest.raises(EngineDead, match="not finite"):
            llm.generate(["fine", "~"], GREEDY)
        idle(llm)
        assert len(llm.generate(["fine"], GREEDY)[0].token_ids) == 30
        monkeypatch.setattr(llm.engine.parts.scheduler, "schedule", lambda: 1 / 0)
        with pytest.raises(EngineDead, match="ZeroDivisionError"):
            llm.generate(["fine"], GREEDY)
        with pytest.raises(EngineDead, match="ZeroDivisionError"):
            list(llm.stream("fine", GREEDY))


def test_a_request_that_turns_out_to_have_no_answer_is_no_dead_engine(tiny_with_end):
    params = SamplingParams(max_tokens=9, min_tokens=9, temperature=0.0, grammar=of_choice(["ab"], "x"))
    with LLM.load(tiny_with_end, CONFIG) as llm:
        with pytest.raises(RequestError, match="min_tokens no end yet") as error:
            llm.generate([[5, 6, 7]], params)
        assert error.value.code == "no_token_allowed"
        assert len(llm.generate([[5, 6, 7]], GREEDY)) == 1


# ---- decoding without a KV cache --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
def test_naive_decoding_gives_the_engines_tokens(llm, prompt):
    ids, params = llm.encode(prompt), SamplingParams(temperature=0.0, max_tokens=60)
    wanted = llm.generate([ids], params)[0]
    assert list(naive_tokens(llm, ids, params)) == wanted.token_ids
    pieces = list(naive_stream(llm, ids, params, ()))
    assert "".join(text for text, _ in pieces) == wanted.text and sum(count for _, count in pieces) == 60


def test_naive_decoding_ends_where_the_engine_does(llm):
    ids = llm.encode(PROMPTS[0])
    whole = llm.generate([ids], GREEDY)[0]
    stop = whole.text[8:11]
    text = "".join(text for text, _ in naive_stream(llm, ids, GREEDY, [stop]))
    assert text == whole.text[: whole.text.index(stop)] == llm.generate([ids], GREEDY, stop=[stop])[0].text
    assert "".join(text for text, _ in naive_stream(llm, ids, GREEDY, [whole.text[-2:] + "and more"])) == whole.text
    params = SamplingParams(temperature=0.0, max_tokens=30, stop_ids=(whole.token_ids[9],))
    assert list(naive_tokens(llm, ids, params)) == llm.generate([ids], params)[0].token_ids
    with pytest.raises(RequestError, match="the context holds"):
        next(naive_tokens(llm, ids, SamplingParams(max_tokens=500)))


# ---- the real model ---------------------------------------------------------------------------------------------------


def test_smollm2_knows_the_capital_of_france(real):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = real.chat(question, SamplingParams(temperature=0.0, max_tokens=40))
    assert "capital of France is Paris" in answer.text and answer.finish == "stop"
    assert answer.token_ids[-1] in real.engine.info.eos_ids and "<|im_end|>" not in answer.text
    naive = naive_tokens(real, real.encode_chat(question), SamplingParams(max_tokens=40))
    assert list(naive) == answer.token_ids


def test_smollm2_writes_english(real):
    """Longer than a sentence: words a person would use, no repetition of one of them."""
    text = real.generate(["The sea is"], SamplingParams(temperature=0.0, max_tokens=40))[0].text
    words = "".join(char if char.isalpha() else " " for char in text.lower()).split()
    common = {"the", "a", "of", "and", "is", "in", "to", "it", "that", "with"}
    assert len(words) >= 20 and len(set(words)) >= 10 and sum(word in common for word in words) >= 5, text


def test_what_is_closed_is_given_back(folder):
    """Weights and cache, in a process that goes on: the next model needs the memory."""
    with LLM.load(folder, CONFIG) as llm:
        llm.generate(PROMPTS[:1], GREEDY)
        runner = llm.engine.parts.runner
        held = [weakref.ref(one) for one in (llm.engine, runner.kv.k[0], runner.model)]
    del llm, runner
    gc.collect()
    assert [one() for one in held] == [None, None, None]
