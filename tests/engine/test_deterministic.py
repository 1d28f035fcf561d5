"""`deterministic: true`: a request's tokens and log-probabilities are the same bits however it is computed.

On the CPU every family of conftest.py; on a GPU (skipped without one) random models in both precisions, and the product that
makes it so on TinyLlama's shapes.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.random_model import write_model
from model_core.dispatch.ops import Ops
from model_core.engine.config import EngineConfig
from model_core.engine.engine import Engine
from model_core.engine.graph_runner import GraphRunner
from model_core.engine.request import Request, SamplingParams
from model_core.errors import ConfigError
from model_core.grammar.spec import of_regex
from model_core.kernels.linear import packing_works
from model_core.kernels.linear_fixed import _MANY, fixed_tiles, linear_fixed
from model_core.weights.checkpoint import open_checkpoint
from tests.engine.served import Served

GPU = torch.cuda.is_available()
only_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device")
only_packed = pytest.mark.skipif(not packing_works(), reason="a CPU needs FBGEMM's products (x86 with AVX2) for this")

PAGE = 8
NEW = 12
# how the answers are chosen: by the graphs, by the sampler, and greedily with log-probabilities
WAYS = [dict(temperature=0.0, logprobs=4), dict(temperature=0.8, seed=11, prompt_logprobs=2),
        dict(temperature=1.1, seed=5, top_k=40, top_p=0.9, min_p=0.01, logprobs=2),
        dict(temperature=0.9, seed=8, top_k=30, top_p=0.95, frequency_penalty=0.5),
        dict(temperature=0.7, seed=6, top_p=0.8, repetition_penalty=1.2, logprobs=0)]  # fmt: skip


def requests(lengths, vocab, new=NEW, twins=True):
    """One request per length and way; the longest prompt comes twice, so that its pages are found again."""
    asked = []
    for row, length in enumerate(lengths):
        prompt = torch.randint(0, vocab, (length,), generator=torch.Generator().manual_seed(row)).tolist()
        asked.append(Request(f"r{row}", prompt, SamplingParams(max_tokens=new, ignore_eos=True, **WAYS[row % len(WAYS)])))
    longest = max(asked, key=lambda one: len(one.prompt_ids))
    return [*asked, Request("twin", longest.prompt_ids, longest.params)] if twins else asked


def run(folder, asked, *, pages=200, alone=False, before=lambda engine: None, **config):
    """{request id: (tokens, log-probabilities)} and the engine's statistics. before: called with the engine that starts."""
    config = dict(dtype="float32", max_seqs=8, page_size=PAGE, threads=1) | config
    size = 2 if config["dtype"] == "bfloat16" else 4
    kv = open_checkpoint(folder).config.kv_bytes_per_token(size) * config["page_size"] * pages
    engine = Engine.load(folder, EngineConfig(deterministic=True, kv_cache_bytes=kv, **config))
    before(engine)
    served = Served(engine)
    for group in [[one] for one in asked] if alone else [asked]:
        served.ask(*group)
    found = {one.request_id: (served.tokens(one.request_id), served.logprobs(one.request_id)) for one in asked}
    stats = served.close()
    assert all(len(tokens) == one.params.max_tokens for one, (tokens, _) in zip(asked, found.values(), strict=True))
    return found, stats


def check_ways(folder, asked, pages, **config):
    """Alone without a cache; then together, with a token budget that cuts prompts, with too few pages, and with prefix hits."""
    wanted, _ = run(folder, asked, alone=True, prefix_cache=False, **config)
    assert wanted["twin"] == wanted[max(asked, key=lambda one: len(one.prompt_ids)).request_id]
    for name, how in (("together", {}), ("short chunks", dict(max_batch_tokens=11)), ("odd chunks", dict(max_batch_tokens=37)),
                      ("preempted", dict(pages=pages, prefix_cache=False)), ("hits", dict(alone=True))):  # fmt: skip
        found, stats = run(folder, asked, **(config | how))
        assert found == wanted, name
        assert name != "preempted" or stats.preemptions
        assert name != "hits" or stats.prefix_hits


# ---- CPU ---------------------------------------------------------------------------------------------------------------


@only_packed
def test_any_company_and_division_on_the_cpu(checkpoint_dirs, oracles, family):
    check_ways(checkpoint_dirs[family], requests([1, 8, 45, 19, 33, 17], 300), pages=22, device="cpu")


@only_packed
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_two_threads(tmp_path, dtype):
    """Rows wide enough that torch divides a chunk among threads."""
    folder = write_model("tiny", tmp_path / "tiny", dtype=torch.float32)
    asked = requests([150, 3, 260], 500, new=4)
    wanted, _ = run(folder, asked, alone=True, prefix_cache=False, device="cpu", dtype=dtype, threads=2)
    assert run(folder, asked, device="cpu", dtype=dtype, threads=2, max_batch_tokens=190)[0] == wanted


@only_packed
@pytest.mark.skipif(GPU, reason="the interpreter, and what it says is asked of a GPU below")
def test_prefill_graphs_decode(tmp_path):
    """The GPU's runner, its kernels in the interpreter: no decode graph, any number of sequences in a prefill's."""
    folder = write_model("tiny", tmp_path / "tiny", dtype=torch.float32)
    digits = of_regex(r"\d{9}", "structured_outputs.regex")
    held = SamplingParams(max_tokens=3, seed=9, ignore_eos=True, stop_ids=(300,), grammar=digits)
    asked = [*requests([1, 12, 5], 500, new=3, twins=False), Request("held", [7, 8], held)]

    def captured(engine):
        parts = engine.parts
        ops = Ops("cpu", overrides={"default": "triton"}, invariant=True)
        parts.runner = GraphRunner(parts.runner.model, ops, parts.runner.kv, parts.limits, PAGE, parts.device)
        assert parts.runner.decodes is None and parts.runner.prefills.seqs == parts.limits.max_seqs
        parts.runner.kv.poison(1e30)
        engine._most_ahead = 1

    found = run(folder, asked, device="cpu", max_seqs=4, before=captured)[0]
    wanted = run(folder, asked, device="cpu", max_seqs=4)[0]
    assert {key: tokens for key, (tokens, _) in found.items()} == {key: tokens for key, (tokens, _) in wanted.items()}
    for key, (_, logprobs) in found.items():
        assert len(logprobs) == len(wanted[key][1])
        assert all(abs(one[0] - other[0]) < 1e-4 for one, other in zip(logprobs, wanted[key][1], strict=True))


def test_a_cpu_that_cannot_is_refused(checkpoint_dirs, oracles, monkeypatch):
    monkeypatch.setattr("model_core.engine.load.packing_works", lambda: False)
    with pytest.raises(ConfigError, match="deterministic: true needs a GPU, or an x86 CPU"):
        Engine.load(checkpoint_dirs["llama3"], EngineConfig(device="cpu", deterministic=True))


def test_torch_kernels_are_refused_on_a_gpu(monkeypatch):
    monkeypatch.setattr("model_core.kernels.runtime.why_unusable", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert {row["choice"] for row in Ops("cuda", invariant=True).explain()} == {"triton"}
    assert Ops("cuda", invariant=True).captured().invariant
    with pytest.raises(ConfigError, match="remove torch from kernels.swiglu"):
        Ops("cuda", overrides={"swiglu": "torch"}, invariant=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ConfigError, match="below compute capability 8.0"):
        Ops("cuda", invariant=True)


# ---- GPU ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_model("tiny", tmp_path_factory.mktemp("model") / "tiny", dtype=torch.float32)


@only_gpu
@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_any_company_and_division_on_a_gpu(tiny, dtype, cuda_graphs):
    lengths = [1, 17, 129, 64, 200, 40, 65, 300]
    check_ways(tiny, requests(lengths, 500, new=40), pages=80, device="cuda", dtype=dtype, cuda_graphs=cuda_graphs)


@only_gpu
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "smollm2"])
def test_families_on_a_gpu(checkpoint_dirs, oracles, family):
    """A sliding window, biases, norms of heads, three heads a group."""
    asked = requests([1, 8, 45, 19, 33, 17], 300)
    check_ways(checkpoint_dirs[family], asked, pages=22, device="cuda", dtype="bfloat16")


@only_gpu
def test_more_sequences_than_a_tile_has_rows(tiny):
    asked = requests([5 + row % 60 for row in range(150)], 500, new=20)
    wanted, _ = run(tiny, asked, device="cuda", dtype="bfloat16", pages=2000, max_seqs=1, prefix_cache=False)
    assert run(tiny, asked, device="cuda", dtype="bfloat16", pages=2000, max_seqs=160)[0] == wanted


@only_gpu
def test_nothing_compiles_after_ready(tiny, monkeypatch):
    from triton import knobs

    compiled = []

    def watch(engine):
        assert engine.parts.runner.decodes is None
        monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **facts: compiled.append(facts["fn"].name))

    run(tiny, requests([1, 17, 129, 200], 500), device="cuda", dtype="bfloat16", before=watch)
    assert compiled == []


@only_gpu
@pytest.mark.parametrize("outputs,inputs", [(2560, 2048), (2048, 2048), (11264, 2048), (2048, 5632), (32000, 2048)])
def test_rows_of_the_product_are_the_same_bits(outputs, inputs):
    """Every number of rows by its own tiles, every tile that another number may get, and any place in the batch."""
    torch.manual_seed(0)
    x = torch.randn(2048, inputs, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) * 0.02
    bias = torch.randn(outputs, device="cuda", dtype=torch.bfloat16)
    alone = torch.cat([linear_fixed(row[None], weight, bias, out_dtype=torch.float32) for row in x[:8]])
    used = set()
    for rows in (1, 2, 7, 64, 65, 300, 2048):
        used.add(fixed_tiles(rows, outputs, x.dtype))
        found = linear_fixed(x[:rows], weight, bias, out_dtype=torch.float32)
        assert torch.equal(found[:8], alone[:rows]), rows
        moved = linear_fixed(x[:rows].flip(0).contiguous(), weight, bias, out_dtype=torch.float32)
        assert torch.equal(moved.flip(0)[:8], alone[:rows]), rows
    assert len(used) > 1
    for tiles in _MANY:
        assert torch.equal(linear_fixed(x[:300], weight, bias, out_dtype=torch.float32, tiles=tiles)[:8], alone), tiles
