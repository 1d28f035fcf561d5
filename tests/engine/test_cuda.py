"""The engine on a GPU gives the tokens that it gives on the CPU. Skipped where there is none (CI); run on an H100."""

from __future__ import annotations

import pytest
import torch

from benchmarks.random_model import SHAPES, write_model
from model_core.engine.config import EngineConfig
from model_core.engine.engine import Engine
from model_core.engine.request import Request, SamplingParams
from tests.engine.served import Served

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PROMPTS = [[(7 * place * place + 31 * row + place) % 500 for place in range(length)]
           for row, length in enumerate([1, 5, 16, 17, 40, 129, 200, 17])]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model("tiny", tmp_path_factory.mktemp("model") / "tiny", dtype=torch.float32)


def run(folder, requests, **config):
    """Token ids and finish reasons by request id, and the engine's statistics."""
    config = {"dtype": "float32", "kv_cache_bytes": config.pop("kv", 8 << 20)} | config
    served = Served(Engine.load(folder, EngineConfig(**config)))
    tokens = served.ask(*requests)
    return tokens, served.finishes(), served.close()


def requests(**params):
    return [Request(f"r{i}", prompt, SamplingParams(max_tokens=40, ignore_eos=True, **params))
            for i, prompt in enumerate(PROMPTS)]  # fmt: skip


@pytest.fixture(scope="module")
def greedy_on_cpu(folder):
    return run(folder, requests(temperature=0.0), device="cpu")[0]


@pytest.mark.parametrize("kernels", [{}, {"default": "torch"}, {"default": "triton"}], ids=["auto", "torch", "triton"])
def test_greedy_tokens_equal_the_cpus(folder, greedy_on_cpu, kernels):
    tokens, finishes, _ = run(folder, requests(temperature=0.0), device="cuda", kernels=kernels)
    assert tokens == greedy_on_cpu
    assert set(finishes.values()) == {"length"}


def test_chunks_and_preemption_change_nothing(folder, greedy_on_cpu):
    pages = 44  # of 16 tokens, 2 layers, 2 heads of 16, float32: too few for all eight at once
    kv = pages * 16 * 2 * 2 * 2 * 16 * 4
    tokens, _, stats = run(folder, requests(temperature=0.0), device="cuda", kv=kv, max_batch_tokens=32, max_seqs=8)
    assert tokens == greedy_on_cpu
    assert stats.preemptions > 0


def test_seeded_sampling_equals_the_cpus(folder):
    params = dict(temperature=0.8, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.1, seed=7, logprobs=2)
    on_cpu, on_gpu = (run(folder, requests(**params), device=device)[0] for device in ("cpu", "cuda"))
    assert on_cpu == on_gpu


@pytest.mark.parametrize("params", [
    dict(top_k=50, top_p=0.9), dict(top_p=0.9, temperature=1.5), dict(min_p=0.05, min_tokens=9, stop_ids=(1, 2)),
    dict(top_k=400, logit_bias={5: 4.0}, presence_penalty=0.7, frequency_penalty=0.2)], ids=str)  # fmt: skip
def test_what_graphs_cut_equals_the_cpus(folder, params):
    """Without log-probabilities nothing is sampled op by op."""
    params = dict(temperature=0.8, seed=7) | params
    on_cpu, on_gpu = (run(folder, requests(**params), device=device)[0] for device in ("cpu", "cuda"))
    assert on_cpu == on_gpu


def test_an_abort_in_flight_frees_its_pages(folder):
    served = Served(Engine.load(folder, EngineConfig(device="cuda", dtype="float32", kv_cache_bytes=8 << 20)))
    served.submit(Request("a", PROMPTS[4], SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)))
    served.until(lambda: served.events)
    served.engine.abort("a")
    served.wait("a")
    assert served.finishes() == {"a": "abort"}
    served.close()


def steps(engine, requests):
    """Token ids by request, of steps that each wait for the one before: what is computed together is the same every time."""
    scheduler, runner, tokens = engine.parts.scheduler, engine.parts.runner, {}
    for request in requests:
        scheduler.add(request)
    while scheduler.has_work:
        plan = scheduler.schedule()
        flight = runner.launch(plan)
        sampled, _ = flight.collect()
        for seq, token in zip(plan.sampling, sampled, strict=True):
            tokens.setdefault(seq.request_id, []).append(token)
        scheduler.commit(plan, sampled)
    engine.shutdown()
    return tokens


@pytest.mark.parametrize("rows", [1, 12, 40])
def test_chained_launches_change_no_bit(tmp_path, monkeypatch, rows):
    """With the kernels that were measured to be the fastest. Flat logits of random weights: one rounding elsewhere would
    choose another of 512 tokens."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(SHAPES, "wide", SHAPES["tiny"] | dict(hidden_size=512, intermediate_size=1408, num_attention_heads=8))
    folder = write_model("wide", tmp_path / "wide")
    ask = [Request(f"r{row}", PROMPTS[row % 8], SamplingParams(max_tokens=48, ignore_eos=True, seed=row, temperature=row % 2))
           for row in range(rows)]  # fmt: skip
    found = []
    for pdl in (True, False):
        config = EngineConfig(device="cuda", kv_cache_bytes=64 << 20, max_seqs=rows, pdl=pdl,
                              calibration="auto" if pdl else "off")  # fmt: skip
        engine = Engine.load(folder, config)
        decodes = engine.parts.runner.decodes
        if pdl:
            tiles = dict(decodes.tiles)
        else:
            for bucket, choice in tiles.items():
                decodes.tiles[bucket] = choice
                decodes.chain.reserve(bucket, choice)
            decodes._graphs.clear()
        found.append(steps(engine, ask))
    assert len(found[0]) == rows and found[0] == found[1]


def test_smollm2_gives_the_same_tokens_by_graphs_by_launches_and_by_references(smollm2_dir):
    ask = [Request(f"r{row}", [1 + (37 * place * (row + 1)) % 40_000 for place in range(length)],
                   SamplingParams(max_tokens=48, temperature=0.0, ignore_eos=True)) for row, length in enumerate([3, 30, 200])]
    ways: list[dict] = [{}, {"cuda_graphs": False}, {"kernels": {"default": "torch"}}]
    graphs, launches, references = (run(smollm2_dir, ask, device="cuda", kv=64 << 20, **way)[0] for way in ways)
    assert graphs == launches == references


def test_bfloat16_stays_near_float32(folder):
    """Random weights give flat logits, so tokens may differ; log-probabilities may not by much."""
    request = Request("r", PROMPTS[5], SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=5))
    best = {}
    for dtype in ("float32", "bfloat16"):
        served = Served(Engine.load(folder, EngineConfig(device="cuda", dtype=dtype, kv_cache_bytes=8 << 20)))
        served.ask(request)
        best[dtype] = dict(served.logprobs("r")[0].top)
        served.close()
    shared = best["float32"].keys() & best["bfloat16"].keys()
    assert len(shared) >= 2
    assert all(abs(best["float32"][token] - best["bfloat16"][token]) < 0.02 for token in shared)


def test_nothing_compiles_after_ready(folder, monkeypatch):
    from triton import knobs

    engine = Engine.load(folder, EngineConfig(device="cuda", dtype="bfloat16", kv_cache_bytes=8 << 20))
    compiled = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **facts: compiled.append(facts["fn"].name))
    served = Served(engine)
    served.ask(*requests(temperature=0.7, top_k=20, top_p=0.9))
    served.close()
    assert compiled == []
