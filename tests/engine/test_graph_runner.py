"""The captured steps against the step-by-step runner: in the interpreter on a CPU (replay is a call), as graphs on a GPU."""

from __future__ import annotations

import time
from itertools import count

import pytest
import torch

from benchmarks.random_model import write_model
from model_core.dispatch.ops import Ops
from model_core.dispatch.tiles import StepTiles
from model_core.engine import graph_runner
from model_core.engine.clock import MOST_AHEAD
from model_core.engine.config import EngineConfig
from model_core.engine.engine import Engine
from model_core.engine.graph_runner import GraphRunner
from model_core.engine.graphs import DecodeGraphs
from model_core.engine.late import LateRows
from model_core.engine.request import Request, SamplingParams
from model_core.grammar import beside
from model_core.grammar.spec import of_choice, of_regex
from model_core.kernels.decode import restrict, sample
from model_core.kernels.decode.attention import SplitTiles
from model_core.kernels.decode.products import RowTiles
from model_core.kernels.decode.tiles import TensorTiles
from model_core.tokenizer.load import load_tokenizer
from tests.engine.served import Served

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
only_gpu = pytest.mark.skipif(not GPU, reason="a minute in the interpreter; the scheduler's tests cover the plans on a CPU")
SPLIT = SplitTiles(32, 16, 4, 1)
ROWS = StepTiles(RowTiles(16, 64, 4), RowTiles(32, 64, 4), RowTiles(64, 64, 4), RowTiles(32, 64, 4), RowTiles(128, 64, 4),
                 SPLIT)  # fmt: skip
TILES = StepTiles(TensorTiles(8, 32, 2, 4, 2), TensorTiles(32, 32, 1, 4, 2), TensorTiles(64, 32, 1, 4, 2),
                  TensorTiles(32, 32, 2, 4, 2), TensorTiles(128, 32, 1, 4, 2), SPLIT)  # fmt: skip
LIBRARY = StepTiles("library", "library", "library", "library", "library", SPLIT)
PROMPTS = [[(7 * place * place + 31 * row + place) % 500 for place in range(length)]
           for row, length in enumerate([1, 17, 40 if GPU else 12])]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model("tiny", tmp_path_factory.mktemp("model") / "tiny", dtype=torch.float32)


def run(folder, requests, *, tiles=None, abort=None, preempt=None, warm_up=True, ahead=1, steps=None,
        **config):  # fmt: skip
    """Tokens, finishes and log-probabilities by request, and the engine's statistics. tiles: of a GraphRunner for all buckets;
    None: the plain runner. ahead: steps in flight at most when a GraphRunner launches one, as on a GPU, wherever this runs.
    steps: a list to which the requests that get a token are added, step by step; all requests then meet in the first one."""
    config = {"dtype": "float32", "kv_cache_bytes": 1 << 20, "max_seqs": 4, "device": DEVICE, "cuda_graphs": False} | config
    engine = Engine.load(folder, EngineConfig(**config))
    parts = engine.parts
    if tiles is not None:
        ops = Ops(parts.device, overrides={"default": "triton"})
        parts.runner = GraphRunner(parts.runner.model, ops, parts.runner.kv, parts.limits, 16, parts.device,
                                   tiles=tiles)
        if warm_up:
            parts.runner.warm_up(parts.limits.max_batch_tokens)
        engine._most_ahead = ahead
    parts.runner.kv.poison(1e30)  # the dump page too

    class Watched(Served):
        def on_step(self, events):
            if steps is not None and any(event.token_ids for event in events):
                steps.append({event.request_id for event in events if event.token_ids})
            if not GPU:
                parts.scheduler.check()
            super().on_step(events)

        def hear(self, event):
            super().hear(event)
            if abort == event.request_id and len(self.tokens(abort)) == 3:
                engine.abort(abort)
            if preempt == event.request_id and len(self.tokens(preempt)) in (2, 4):
                parts.scheduler.preempt(preempt)

    names = [request.request_id for request in requests]
    if steps is not None:
        for request in requests:
            engine._inbox.submit(engine._seeded(request), engine.prepare(request))
    served = Watched(engine)
    if steps is None:
        served.submit(*requests)
    served.wait(*names)
    tokens, logprobs = ({name: of(name) for name in names} for of in (served.tokens, served.logprobs))
    return tokens, served.finishes(), logprobs, served.close()


def ask(max_tokens=40 if GPU else 3, **params):
    return [Request(f"r{i}", prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True, **params))
            for i, prompt in enumerate(PROMPTS)]  # fmt: skip


@pytest.mark.parametrize("tiles", [pytest.param(ROWS, marks=only_gpu), TILES, pytest.param(LIBRARY, marks=only_gpu)],
                         ids=["rows", "tiles", "library"])  # fmt: skip
def test_greedy_tokens_are_the_plain_runners(folder, tiles):
    requests = ask(temperature=0.0)
    expected = run(folder, requests)
    actual = run(folder, requests, tiles={1: ROWS, 2: tiles, 4: tiles})
    assert actual[:2] == expected[:2]


@pytest.mark.parametrize("longest", [10**6, 0], ids=["joined", "apart"])
def test_decodes_ride_with_prompts(folder, monkeypatch, longest):
    """One graph does both, unless contexts are too long: either way a mixed step gives the same tokens."""
    monkeypatch.setattr(graph_runner, "_LONGEST_JOINED", longest)
    decoded, rode = [], []
    decode, prefill = GraphRunner._decode, GraphRunner._prefill
    monkeypatch.setattr(GraphRunner, "_decode", lambda self, flight, *rest: decoded.append(flight.plan)
                        or decode(self, flight, *rest))  # fmt: skip
    monkeypatch.setattr(GraphRunner, "_prefill", lambda self, flight, entries, *rest: rode.append(
        len(entries) > len(flight.plan.chunks) > 0) or prefill(self, flight, entries, *rest))  # fmt: skip
    requests = ask(temperature=0.0)
    chunked = dict(max_batch_tokens=9, warm_up=GPU)  # r0 has begun to answer when the other prompts are read
    assert run(folder, requests, tiles={4: TILES}, **chunked)[:2] == run(folder, requests)[:2]
    mixed = [plan for plan in decoded if plan.chunks]
    assert any(rode) and not mixed if longest else mixed  # a prompt's last token by itself rides in any case


def test_tokens_do_not_depend_on_the_steps_in_flight(folder):
    """As many as the rings of buffers are made for; one sequence stops in the middle of them."""
    stop = run(folder, ask(temperature=0.0, max_tokens=9))[0]["r1"][2]
    params = [dict(max_tokens=9, ignore_eos=True), dict(max_tokens=9, ignore_eos=True, stop_ids=(stop,))]
    requests = [Request(f"r{i}", PROMPTS[i], SamplingParams(temperature=0.0, **params[i])) for i in range(2)]
    expected = run(folder, requests)
    assert expected[1] == {"r0": "length", "r1": "stop"} and len(expected[0]["r1"]) == 3
    for ahead in (1, MOST_AHEAD) if GPU else (MOST_AHEAD,):
        assert run(folder, requests, tiles={2: TILES, 4: TILES}, warm_up=GPU, ahead=ahead)[:2] == expected[:2]


@only_gpu
def test_chunks_preemption_and_prefix_hits_change_nothing(folder):
    """A chunk of one token is not a decode; a preempted sequence comes back into another slot."""
    requests = ask(temperature=0.0, max_tokens=40)
    expected = run(folder, requests)
    page = 16 * 2 * 2 * 2 * 16 * 4  # bytes: tokens, K and V, layers, heads, size of a head, float32
    actual = run(folder, [*requests, Request("again", PROMPTS[2], requests[0].params)], tiles={1: TILES, 4: TILES},
                 max_seqs=4, max_batch_tokens=13, kv_cache_bytes=10 * page)  # fmt: skip
    assert actual[3].preemptions > 0 and actual[3].prefix_hits > 0
    assert {key: actual[0][key] for key in expected[0]} == expected[0] and actual[0]["again"] == expected[0]["r2"]


def test_seeded_and_every_other_way_of_sampling(folder, monkeypatch):
    """The graphs' own, but for log-probabilities: those rows are sampled again from the graph's logits."""
    again, inner = [], LateRows._again
    monkeypatch.setattr(LateRows, "_again", lambda self, rows, *rest: again.extend(rows) or inner(self, rows, *rest))
    graphs, get = set(), DecodeGraphs.get
    monkeypatch.setattr(DecodeGraphs, "get", lambda self, *key: graphs.add(key[2:]) or get(self, *key))
    edits = dict(frequency_penalty=1.5, repetition_penalty=1.2, logit_bias={7: 9.0, 8: 8.9})
    ways = [dict(temperature=1.0, seed=3), dict(temperature=0.8, seed=4, top_k=50, top_p=0.9, min_p=0.02, **edits),
            dict(temperature=0.0, logprobs=2, **edits), dict(temperature=0.0, min_tokens=2, stop_ids=(7, 8), **edits)]
    requests = [Request(f"r{i}", PROMPTS[i % 3], SamplingParams(max_tokens=3, ignore_eos=True, **way))
                for i, way in enumerate(ways)]  # fmt: skip
    expected, actual = run(folder, requests), run(folder, requests, tiles={4: TILES}, warm_up=GPU)
    assert actual[:2] == expected[:2] and actual[1]["r3"] == "stop"
    assert {entry.seq.request_id for _, entry in again} == {"r2"}
    assert (True,) in graphs, "rows were cut"
    got, wanted = actual[2]["r2"], expected[2]["r2"]
    assert len(got) == 3 and all(abs(a.logprob - b.logprob) < 1e-4 for a, b in zip(got, wanted, strict=True))


PHONE = of_regex(r"\d{3}-\d{4}" if GPU else r"\d-\d\d", "structured_outputs.regex")
CHOICE = of_choice(["abcd", "abxy"], "structured_outputs.choice")


def under(name, row, grammar, **params):
    params = dict(max_tokens=12, ignore_eos=True, stop_ids=(300,), grammar=grammar, logit_bias={300: 5.0}) | params
    return Request(name, PROMPTS[row], SamplingParams(**params))


def test_grammars_take_part_in_every_step(folder):
    """Three of them beside a free one, in every way of sampling: the plain runner's tokens, and one in each step, though the
    step before is in flight when the next is launched."""
    requests = [under("r0", 0, CHOICE, temperature=1.0, seed=3), under("r1", 1, PHONE, temperature=0.0, frequency_penalty=1.5),
                Request("r2", PROMPTS[0], SamplingParams(max_tokens=6, ignore_eos=True, temperature=0.7, seed=4)),
                under("r3", 0, PHONE, temperature=0.0, logprobs=2)]  # fmt: skip
    expected, steps = run(folder, requests), []
    actual = run(folder, requests, tiles={4: TILES}, warm_up=GPU, ahead=MOST_AHEAD, steps=steps)
    assert actual[:2] == expected[:2] and [actual[1][f"r{i}"] for i in range(4)] == ["stop", "stop", "length", "stop"]
    assert bytes_of(folder, actual[0]["r0"][:-1]) in (b"abcd", b"abxy") and len(actual[0]["r1"]) == (9 if GPU else 5)
    assert all(abs(a.logprob - b.logprob) < 1e-4 for a, b in zip(actual[2]["r3"], expected[2]["r3"], strict=True))
    for name, tokens in actual[0].items():
        assert [name in names for names in steps] == [True] * len(tokens) + [False] * (len(steps) - len(tokens)), name


def test_grammars_across_preemption_and_aborts(folder):
    """Of one that is preempted the next step is in flight, and so of one that is aborted; the former comes back, by a chunk in
    one graph with a third one's decode, whose mask waits for a token."""
    digits = of_regex(r"\d{9}", "structured_outputs.regex")
    requests = [under("r0", 0, CHOICE, temperature=1.0, seed=3, top_k=40), under("r1", 0, PHONE, temperature=1.0, seed=5),
                under("r2", 0, digits, temperature=0.0, max_tokens=8)]  # fmt: skip
    expected = run(folder, requests)
    actual = run(folder, requests, tiles={4: TILES}, preempt="r0", abort="r1", warm_up=GPU, ahead=MOST_AHEAD, steps=[])
    assert actual[3].preemptions == 2 and actual[1] == {"r0": "stop", "r1": "abort", "r2": "length"}
    assert all(actual[0][name] == expected[0][name] for name in ("r0", "r2"))
    assert 3 <= len(actual[0]["r1"]) <= 4 and actual[0]["r1"] == expected[0]["r1"][: len(actual[0]["r1"])]


def test_rows_sit_out_steps_in_which_their_masks_are_not_there(folder, monkeypatch):
    """And keep their tokens, of the first one of a prompt on: what was computed in vain is computed again, as a chunk."""
    far = of_regex(r"[a-z]{600}", "structured_outputs.regex")
    ways = [dict(temperature=1.0, seed=3, frequency_penalty=1.5), dict(temperature=0.0, logprobs=2)]
    requests = [under(f"r{row}", 0, far, max_tokens=5, **way) for row, way in enumerate(ways)]
    requests.append(Request("r2", PROMPTS[0], SamplingParams(max_tokens=8, ignore_eos=True, temperature=0.7, seed=4)))
    with monkeypatch.context() as patched:
        patched.setattr(beside, "WAIT_S", 60.0)
        expected = run(folder, requests)
    inner, numbers, steps = beside._filled, count(), []
    monkeypatch.setattr(beside, "_filled", lambda *args: (time.sleep(next(numbers) % 3 != 1 and 0.05), inner(*args))[1])
    actual = run(folder, requests, tiles={4: TILES}, warm_up=GPU, ahead=MOST_AHEAD, steps=steps)
    assert actual[:2] == expected[:2] and set(actual[1].values()) == {"length"}
    assert any(not {"r0", "r1"} <= names for names in steps[:5])


def test_a_grammar_that_allows_nothing_more_ends_one_request_alone(folder):
    """With its next step in flight, whose row is computed in vain."""
    short = of_choice(["a"], "structured_outputs.choice")
    requests = [under("stuck", 0, short, min_tokens=9), under("fine", 0, CHOICE, seed=3)]
    expected = run(folder, requests)
    actual = run(folder, requests, tiles={2: TILES}, warm_up=GPU, ahead=MOST_AHEAD, max_seqs=2, steps=[])
    assert actual[:2] == expected[:2] and actual[1] == {"stuck": "error", "fine": "stop"} and len(actual[0]["stuck"]) == 1


@only_gpu
def test_nothing_is_compiled_for_the_first_grammar(folder, monkeypatch):
    from triton.runtime.jit import JITFunction

    kernels, compiled, inner, warm_up = (restrict._kernel, sample._kernel), [], JITFunction._do_compile, GraphRunner.warm_up
    for kernel in kernels:
        kernel.device_caches.clear()
    monkeypatch.setattr(JITFunction, "_do_compile", lambda self, *args: compiled.append(self) or inner(self, *args))
    monkeypatch.setattr(GraphRunner, "warm_up", lambda self, *args: (warm_up(self, *args), compiled.append("served")))
    ways = [dict(temperature=0.0), dict(top_k=5, top_p=0.9, frequency_penalty=1.0), dict(logprobs=1)]
    run(folder, [under(f"r{i}", i, PHONE, **way) for i, way in enumerate(ways)], tiles={1: TILES, 4: TILES}, steps=[])
    at = compiled.index("served")
    assert set(kernels) <= set(compiled[:at]) and not set(kernels) & set(compiled[at:])


def bytes_of(folder, tokens):
    table = load_tokenizer(folder).byte_table(skip_special_tokens=False)
    return b"".join(table[token] for token in tokens)


def test_a_preempted_sequence_keeps_its_counts_and_cuts(folder):
    """Whatever it has said so far is counted when it comes back, and its stop id is still too early."""
    wishes = dict(temperature=0.9, seed=5, top_k=5, top_p=0.95, presence_penalty=2.0, min_tokens=30 if GPU else 6,
                  stop_ids=(3,), logit_bias=dict.fromkeys((3, 4, 5, 6, 7, 8, 9), 9.0))  # fmt: skip
    requests = [Request("r0", PROMPTS[0], SamplingParams(max_tokens=40 if GPU else 6, ignore_eos=True, **wishes))]
    expected = run(folder, requests)
    actual = run(folder, requests, tiles={1: TILES}, preempt="r0", warm_up=GPU, max_seqs=1)
    assert actual[3].preemptions == 2 and actual[0] == expected[0]


def test_prompts_are_scored_beside_others(folder):
    """In chunks, with decodes in the same step; without a token at the end, too."""
    requests = [Request("r0", PROMPTS[1], SamplingParams(max_tokens=3, ignore_eos=True, temperature=0.0)),
                Request("r1", PROMPTS[1], SamplingParams(max_tokens=2, ignore_eos=True, temperature=0.0, prompt_logprobs=1)),
                Request("r2", PROMPTS[2], SamplingParams(max_tokens=0, prompt_logprobs=0))]  # fmt: skip
    expected = run(folder, requests)
    actual = run(folder, requests, tiles={4: TILES}, warm_up=GPU, max_batch_tokens=13)
    assert actual[:2] == expected[:2] and actual[0]["r2"] == [] and actual[1]["r2"] == "length"
    for name, prompt in (("r1", PROMPTS[1]), ("r2", PROMPTS[2])):
        got, wanted = actual[2][name], expected[2][name]
        assert len(got) == len(wanted) == len(prompt) - 1 and [rank for _, rank in got] == [rank for _, rank in wanted]
        assert all(abs(a - b) < 1e-4 for (a, _), (b, _) in zip(got, wanted, strict=True))
    assert actual[2]["r0"] == []


@only_gpu
def test_an_abort_in_flight_leaves_the_others_alone(folder):
    requests = ask(temperature=0.0)
    expected = run(folder, requests)
    actual = run(folder, requests, tiles={4: TILES}, abort="r1")
    assert actual[1]["r1"] == "abort"
    assert all(actual[0][key] == expected[0][key] for key in ("r0", "r2"))
