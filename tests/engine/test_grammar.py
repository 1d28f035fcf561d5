"""Output under grammars: valid whatever the weights, the same however steps are cut up, and nobody else notices."""

from __future__ import annotations

import json
import threading
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model_core.engine.clock import MOST_AHEAD
from model_core.engine.config import EngineConfig
from model_core.engine.engine import Engine
from model_core.engine.llm import LLM, Completion
from model_core.engine.request import UNANSWERABLE, Request, SamplingParams
from model_core.errors import EngineDead, RequestError
from model_core.grammar.spec import of_choice, of_json_object, of_regex, of_schema
from tests.grammar.test_schema import SCHEMAS, TREE

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = EngineConfig(device="cpu", dtype="float32", threads=1, max_seqs=4, kv_cache_bytes=2 << 20)
PHONE = of_regex(r"\d{3}-\d{4}", "structured_outputs.regex")
OBJECT = of_schema({"type": "object", "properties": {"a": {"type": "string", "maxLength": 8}, "b": {"type": "integer"}},
                    "required": ["a", "b"]}, "response_format")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tiny_with_end):
    return tiny_with_end


@pytest.fixture(scope="module")
def llm(folder):
    with LLM.load(folder, CONFIG) as llm:
        yield llm


@pytest.fixture(scope="module")
def closing(llm) -> dict[int, float]:
    """A liking for what closes, without which random weights seldom come to an end."""
    table = llm.tokenizer.byte_table(skip_special_tokens=True)
    return {i: 4.0 for i, text in enumerate(table) if text[:1] in (b'"', b"}", b"]")} | {511: 6.0}


def ask(llm: LLM, *params: SamplingParams) -> list[Completion]:
    return llm.generate([f"prompt {i}" for i in range(len(params))], params)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_json_is_valid_whatever_the_weights(llm, closing, schema: Any, seed: int) -> None:
    whole = {"$defs": {"tree": TREE}, "allOf": [schema]}
    try:
        spec = of_schema(whole, "response_format")
    except RequestError:  # see test_schema.py
        return
    ways = [dict(temperature=0.0), dict(temperature=1.0), dict(temperature=2.0, top_k=40, logprobs=3),
            dict(temperature=1.0, top_p=0.9, frequency_penalty=1.0, logit_bias=closing)]  # fmt: skip
    for one in ask(llm, *(SamplingParams(max_tokens=60, seed=seed % 2**62, grammar=spec, **way) for way in ways)):
        if one.finish == "stop":
            jsonschema.validate(json.loads(one.text), whole, cls=jsonschema.Draft202012Validator)
        else:
            assert one.finish == "length" and len(one.token_ids) == 60


def test_it_ends_by_itself_and_a_cut_one_says_so(llm) -> None:
    whole, cut, choice = ask(llm, SamplingParams(max_tokens=100, grammar=PHONE), SamplingParams(max_tokens=3, grammar=PHONE),
                             SamplingParams(grammar=of_choice(["red", "green"], "structured_outputs.choice")))  # fmt: skip
    assert whole.finish == "stop" and len(whole.text) == 8 and whole.text[3] == "-"
    assert cut.finish == "length" and len(cut.token_ids) == 3
    assert choice.finish == "stop" and choice.text in ("red", "green")


def test_neighbours_keep_their_tokens(llm) -> None:
    plain = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    alone = ask(llm, plain, plain, plain)
    beside = ask(llm, plain, SamplingParams(max_tokens=40, grammar=OBJECT, temperature=0.0), plain)
    assert [beside[0].token_ids, beside[2].token_ids] == [alone[0].token_ids, alone[2].token_ids]
    assert beside[1].token_ids != alone[1].token_ids


def test_min_tokens_keep_an_answer_open_or_end_it_alone_with_a_reason(llm) -> None:
    digits = of_regex(r"\d{2,30}", "structured_outputs.regex")
    (longer,) = ask(llm, SamplingParams(max_tokens=60, min_tokens=10, grammar=digits, seed=3))
    assert longer.finish in ("stop", "length") and len(longer.token_ids) >= 10
    finishes: dict[str, list[Any]] = {}
    done = threading.Event()

    def deliver(events):
        for event in events:
            if event.finish:
                finishes[event.request_id] = [event.finish, event.error]
        if len(finishes) == 2:
            done.set()

    inner, llm.engine._on_step = llm.engine._on_step, deliver
    try:
        llm.engine.submit(Request("stuck", [1, 2], SamplingParams(max_tokens=60, min_tokens=20, grammar=PHONE)))
        llm.engine.submit(Request("other", [1, 2], SamplingParams(max_tokens=20, ignore_eos=True)))
        assert done.wait(60)
    finally:
        llm.engine._on_step = inner
    why = "its grammar allows nothing but an end here, and min_tokens no end yet"
    assert finishes["stuck"] == ["error", UNANSWERABLE + why]
    assert finishes["other"] == ["length", None]


def test_stop_ids_end_it_where_the_grammar_may_end(llm) -> None:
    stop = llm.tokenizer.encode("x", add_special_tokens=False)[-1]
    params = SamplingParams(max_tokens=50, ignore_eos=True, stop_ids=(stop,), grammar=PHONE, logit_bias={stop: 100.0})
    (found,) = ask(llm, params)
    assert found.finish == "stop" and found.token_ids[-1] == stop and len(found.text) == 8
    with pytest.raises(RequestError, match="needs stop_token_ids") as caught:
        ask(llm, SamplingParams(ignore_eos=True, grammar=PHONE))
    assert caught.value.param == "ignore_eos"


def test_logprobs_are_of_the_model_and_not_of_the_mask(llm) -> None:
    plain, held = ask(llm, SamplingParams(max_tokens=1, temperature=0.0, logprobs=5),
                      SamplingParams(max_tokens=1, temperature=0.0, logprobs=5, grammar=PHONE))  # fmt: skip
    (again,) = ask(llm, SamplingParams(max_tokens=1, temperature=0.0, logprobs=5, grammar=PHONE))
    assert plain.logprobs[0].top == pytest.approx(again.logprobs[0].top)
    assert held.text.isdigit() and held.logprobs[0].logprob < plain.logprobs[0].logprob


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_preemption_and_chunks_change_nothing(folder, temperature: float) -> None:
    params = [SamplingParams(max_tokens=40, temperature=temperature, seed=7 + i, grammar=grammar)
              for i, grammar in enumerate([OBJECT, of_json_object("response_format"), PHONE, None])]  # fmt: skip
    with LLM.load(folder, CONFIG) as llm:
        expected = [one.token_ids for one in ask(llm, *params)]
    with LLM.load(folder, EngineConfig(**{**vars(CONFIG), "max_batch_tokens": 7})) as llm:
        inner = llm.engine._on_step

        def deliver(events):
            inner(events)
            for event in events[:: 1 + len(events) // 2]:
                llm.engine.parts.scheduler.preempt(event.request_id)

        llm.engine._on_step = deliver
        assert [one.token_ids for one in ask(llm, *params)] == expected
        assert llm.engine.stats().preemptions > 20


def test_one_step_ahead_changes_nothing(folder, llm) -> None:
    """The step-by-step runner with steps in flight: each row has a token in every step, so as many steps as without."""
    params = [SamplingParams(max_tokens=40, temperature=temperature, seed=7 + i, grammar=grammar, logprobs=logprobs)
              for i, (grammar, temperature, logprobs) in enumerate([(OBJECT, 1.0, None), (PHONE, 0.0, 2), (PHONE, 1.0, None),
                                                                    (None, 1.0, None)])]  # fmt: skip
    before = llm.engine.stats().steps
    expected = [one.token_ids for one in ask(llm, *params)]
    before = llm.engine.stats().steps - before
    with LLM.load(folder, CONFIG) as ahead:
        ahead.engine._most_ahead = MOST_AHEAD
        assert [one.token_ids for one in ask(ahead, *params)] == expected
        assert ahead.engine.stats().steps <= before + 4  # requests may come one by one, and the last row may be one in vain


def test_a_wrong_grammar_is_refused_before_anything_runs(llm) -> None:
    from model_core.grammar.spec import of_ebnf

    steps = llm.engine.stats().steps
    with pytest.raises(RequestError, match="structured_outputs.grammar"):
        ask(llm, SamplingParams(), SamplingParams(grammar=of_ebnf("root ::= nothing", "structured_outputs.grammar")))
    assert llm.engine.stats().steps == steps


def test_without_a_tokenizer_it_is_refused(folder, tmp_path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    engine = Engine.load(tmp_path, CONFIG)
    engine.start(lambda events: None)
    try:
        with pytest.raises(RequestError, match="cannot be constrained"):
            engine.submit(Request("a", [1], SamplingParams(grammar=PHONE)))
    finally:
        engine.shutdown()
    with pytest.raises(EngineDead):
        engine.submit(Request("a", [1], SamplingParams(grammar=PHONE)))
