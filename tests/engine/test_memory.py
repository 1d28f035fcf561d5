"""The ledger: what it predicts against what is there, what it gives to pages, and whether its advice helps."""

from __future__ import annotations

import re
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model_core.engine import memory
from model_core.engine.config import EngineConfig
from model_core.engine.load import load_parts, place
from model_core.engine.memory import GIB, Ledger, plan_memory
from model_core.engine.plan import Scored
from model_core.engine.request import Request, SamplingParams
from model_core.engine.sampler import Sampler
from model_core.engine.scores import Scorer
from model_core.engine.sequence import Sequence
from model_core.errors import ConfigError, OutOfMemory
from model_core.kernels.linear import packing_works
from model_core.model.config import ModelConfig

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = ModelConfig("llama", num_layers=4, hidden_size=256, intermediate_size=512, num_heads=8, num_kv_heads=2, head_dim=32,
                    vocab_size=1000, context_length=2048)  # fmt: skip
PAGE_BYTES = 2 * 4 * 2 * 32 * 4 * 16  # keys and values, layers, heads, head size, float32, tokens


def plan(available: int, *, device="cpu", max_seqs=4, max_batch_tokens=64, **config) -> Ledger:
    return plan_memory(MODEL, EngineConfig(**config), device=device, element_bytes=4, kv_element_bytes=4, max_seqs=max_seqs,
                       max_batch_tokens=max_batch_tokens, available=available)  # fmt: skip


class Peak(TorchDispatchMode):
    """Bytes of the tensors that torch's ops made, at their most."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most, self.sizes = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor) and (key := leaf.untyped_storage()._cdata) not in given | self.sizes.keys():
                self.sizes[key] = leaf.untyped_storage().nbytes()
                self.now += self.sizes[key]
                self.most = max(self.most, self.now)
                weakref.finalize(leaf.untyped_storage(), self._freed, key)
        return found

    def _freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


# ---- predictions ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not packing_works(), reason="the ledger counts the packed copies of an x86 CPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_pages_and_sampler_take_what_was_predicted(checkpoint_dirs, oracles, family, dtype):
    config = EngineConfig(device="cpu", dtype=dtype, threads=1, kv_cache_bytes=140_000, max_seqs=5, max_batch_tokens=64)
    parts = load_parts(checkpoint_dirs[family], config)
    ledger, runner = parts.ledger, parts.runner
    state = [table for table in vars(runner.sampler).values() if isinstance(table, torch.Tensor)]
    assert ledger.pages == runner.kv.nbytes <= 140_000 < ledger.pages + ledger.page_bytes
    assert runner.model.nbytes == pytest.approx(ledger.weights, rel=0.03)
    assert sum(table.nbytes for table in state) == pytest.approx(ledger.sampler, rel=0.01)


def test_the_peak_of_a_step_is_within_the_prediction(checkpoint_dirs, oracles):
    """All of max_batch_tokens in one prompt, and one prompt beside decodes."""
    config = EngineConfig(device="cpu", dtype="float32", threads=1, kv_cache_bytes=1 << 20, max_seqs=8, max_batch_tokens=120)
    parts = load_parts(checkpoint_dirs["llama3"], config)
    for queries, contexts in (((120,), (120,)), ((1,) * 7 + (100,), (128,) * 8)):
        batch = parts.runner._dummy(queries, contexts)
        with Peak() as peak:
            parts.runner.model.forward(batch, parts.runner.kv)
        logits = 4 * len(queries) * parts.model.vocab_size
        assert 0.5 * parts.ledger.activations < peak.most < parts.ledger.activations + logits


@pytest.mark.parametrize("params", [dict(), dict(top_k=5, top_p=0.9), dict(
    top_k=1000, top_p=0.9, min_p=0.1, logprobs=20, frequency_penalty=1.0, logit_bias={1: 2.0})], ids=str)  # fmt: skip
def test_the_peak_of_sampling_is_within_the_prediction(params):
    rows, vocab, params = 8, 4000, SamplingParams(**params)
    model = ModelConfig("llama", 1, 8, 8, 1, 1, 8, vocab, 64)
    ledger = plan_memory(model, EngineConfig(), device="cpu", element_bytes=4, kv_element_bytes=4, max_seqs=rows,
                         max_batch_tokens=8, available=GIB)  # fmt: skip
    sampler, logits = Sampler(rows, vocab, torch.device("cpu")), torch.randn(rows, vocab)
    for slot in range(rows):
        sampler.assign(slot, params, slot, [0], 1)
    with Peak() as peak:
        sampler.sample(logits, torch.arange(rows), torch.arange(rows), [params] * rows, [])
    assert 0.75 * ledger.logits < peak.most + logits.nbytes < ledger.logits


def test_the_peak_of_scoring_a_prompt_is_within_the_prediction():
    rows, vocab = 8, 4000
    config = ModelConfig("llama", 1, 8, 8, 1, 1, 8, vocab, 64)
    ledger = plan_memory(config, EngineConfig(), device="cpu", element_bytes=4, kv_element_bytes=4, max_seqs=rows,
                         max_batch_tokens=8, available=GIB)  # fmt: skip
    head, hidden = torch.randn(vocab, 8), torch.randn(500, 8)
    model = SimpleNamespace(config=config, invariant=False, logits=lambda hidden: hidden @ head.T)
    prompt = Request("a", list(range(501)), SamplingParams(prompt_logprobs=20))
    with Peak() as peak:
        [(_, found)] = Scorer(model, rows).score(hidden, [Scored(Sequence.of(prompt, 0), 0, 0, 500)])
    assert 0.25 * ledger.logits < peak.most < ledger.logits and len(found.own) == 500


# ---- pages ------------------------------------------------------------------------------------------------------------


def test_pages_get_what_is_asked_for_in_whole_pages():
    assert plan(GIB, kv_cache_bytes=10 * PAGE_BYTES).num_pages == 10
    assert plan(GIB, kv_cache_bytes=11 * PAGE_BYTES - 1).num_pages == 10
    assert plan(GIB, kv_cache_bytes=10 * PAGE_BYTES).page_bytes == PAGE_BYTES


def test_a_gpu_gives_pages_all_that_is_left():
    ledger = plan(2 * GIB, device="cuda", max_seqs=400)
    assert 0 <= 2 * GIB - ledger.total < PAGE_BYTES


def test_a_cpu_gives_pages_a_quarter_and_2_gib_at_most():
    assert plan(GIB, max_seqs=100).num_pages == GIB // 4 // PAGE_BYTES
    assert plan(100 * GIB, max_seqs=1000).num_pages == 2 * GIB // PAGE_BYTES


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_more_pages_than_all_slots_can_use(device):
    """Full contexts, a page of slack each and the dump page, whatever is asked for or left."""
    assert plan(60 * GIB, device=device).num_pages == plan(60 * GIB, device=device, kv_cache_bytes=50 * GIB).num_pages
    assert plan(60 * GIB, device=device).num_pages == 4 * (2048 // 16 + 1) + 1
    assert plan(60 * GIB, device=device, context_length=100).num_pages == 4 * (7 + 1) + 1


def test_the_context_shrinks_to_what_the_pool_holds(checkpoint_dirs, oracles):
    from model_core.weights.checkpoint import open_checkpoint

    model = open_checkpoint(checkpoint_dirs["llama3"]).config
    pages = model.kv_bytes_per_token(4) * 16

    def context(**config) -> int:
        return place(model, EngineConfig(device="cpu", max_seqs=1, **config)).limits.max_context

    assert context() == 128 and context(context_length=50) == 50
    assert context(kv_cache_bytes=5 * pages) == 64 and context(kv_cache_bytes=5 * pages, context_length=50) == 50
    with pytest.raises(ConfigError, match="context_length is 129, this model's is 128"):
        context(context_length=129)


@settings(deadline=None, max_examples=200)
@given(available=st.integers(0, 3 * GIB), kv=st.none() | st.integers(1, 3 * GIB), seqs=st.integers(1, 300),
       tokens=st.integers(1, 5000), device=st.sampled_from(["cpu", "cuda"]))  # fmt: skip
def test_a_ledger_adds_up_or_says_what_would(available, kv, seqs, tokens, device):
    """The two numbers of the message work, and nothing outside of them; if there are none, no pool would fit."""

    def planned(kv: int | None) -> Ledger:
        return plan(available, device=device, kv_cache_bytes=kv, max_seqs=seqs, max_batch_tokens=tokens)

    try:
        ledger = planned(kv)
    except OutOfMemory as error:
        assert f"max_batch_tokens (now {tokens})" in str(error) and f"max_seqs (now {seqs})" in str(error)
        assert ("gpu_memory_fraction" in str(error)) == (device == "cuda")
        found = re.search(r"kv_cache_bytes to at most (\d+) and at least (\d+) \(now (\w+)\)", str(error))
        if found is None:
            with pytest.raises(OutOfMemory):
                planned(3 * PAGE_BYTES)
            return
        most, least = int(found[1]), int(found[2])
        assert found[3] == str(kv) and least <= most
        assert planned(least).num_pages == 3 and planned(most).total <= available
        with pytest.raises(OutOfMemory):
            planned(least - 1)
    else:
        assert ledger.total <= available and ledger.num_pages >= 3
        assert ledger.total == sum(size for _, size in ledger.rows()[:-2])


def test_a_model_that_is_too_large_is_refused_with_the_whole_ledger():
    with pytest.raises(OutOfMemory) as caught:
        plan(300 << 20, max_seqs=2000)
    wanted = plan(GIB, max_seqs=2000)
    for name, size in wanted.rows()[:1] + wanted.rows()[2:6]:
        assert f"{name} {size / GIB:.2f} GiB" in str(caught.value)
    assert re.search(r"available 0.29 GiB; 0\.\d\d GiB short\. Lower max_batch_tokens \(now 64\)", str(caught.value))


# ---- the machine ------------------------------------------------------------------------------------------------------

MEMINFO = "MemTotal:       16000 kB\nMemFree:  100 kB\nMemAvailable:    8000 kB\n"


@pytest.mark.parametrize("limit, used, wanted", [
    (None, None, 8000 << 10), ("max\n", "5\n", 8000 << 10), (str(3000 << 10), str(1000 << 10), 2000 << 10),
    (str(9000 << 20), "0", 8000 << 10), (str(1000 << 10), str(1200 << 10), 0),
], ids=["no control group", "no limit", "limit", "wide limit", "beyond the limit"])  # fmt: skip
def test_available_memory_is_the_kernels_or_the_control_groups(monkeypatch, tmp_path, limit, used, wanted):
    files = {"/proc/meminfo": MEMINFO, "/sys/fs/cgroup/memory.max": limit, "/sys/fs/cgroup/memory.current": used}
    for name, text in files.items():
        if text is not None:
            (tmp_path / name.replace("/", "_")).write_text(text)
    monkeypatch.setattr(memory, "Path", lambda name: tmp_path / str(Path(name)).replace("/", "_"))
    assert memory.available_host_memory() == wanted
