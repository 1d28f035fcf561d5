"""Calibration on a GPU. Skipped where there is none (CI)."""

from __future__ import annotations

import pytest
import torch

from benchmarks.random_model import write_model
from model_core.engine.config import EngineConfig
from model_core.engine.engine import Engine
from model_core.engine.request import Request, SamplingParams
from tests.engine.served import Served


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mini-llm" / "dispatch"


def greedy(folder, requests, **config):
    engine = Engine.load(folder, EngineConfig(device="cuda", kv_cache_bytes=8 << 20, max_seqs=12, **config))
    served = Served(engine)
    tokens = served.ask(*requests)
    logprobs = {name: served.logprobs(name) for name in tokens}
    table, startup = engine.dispatch_table(), engine.parts.startup.seconds()
    served.close()
    return tokens, logprobs, table, startup


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_calibrated_engine_gives_the_default_ones_tokens(tmp_path, cache, dtype):
    folder = write_model("tiny", tmp_path / "tiny", dtype=torch.float32)
    prompts = [[(7 * place * place + 31 * row + place) % 500 for place in range(3 + 5 * row)] for row in range(10)]
    requests = [Request(f"r{row}", prompt, SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True, logprobs=3))
                for row, prompt in enumerate(prompts)]  # fmt: skip
    wanted, wanted_logprobs, table, startup = greedy(folder, requests, dtype=dtype, calibration="off")
    assert "calibration" not in startup and not any("measured:" in row["reason"] for row in table)
    got, got_logprobs, table, startup = greedy(folder, requests, dtype=dtype, calibration="auto")
    assert startup["calibration"] > 0 and len(list(cache.glob("*.json"))) == 1
    assert all("measured:" in row["reason"] or "default" in row["reason"] for row in table if row["op"].startswith("decode"))
    assert any(time is not None for row in table if row["op"] == "decode qkv" for time in row["candidates"].values())
    if dtype == "float32":
        assert got == wanted
    else:  # flat logits in 8 bits: tokens may part ways, their probabilities not by much
        for key in wanted:
            assert abs(got_logprobs[key][1].logprob - wanted_logprobs[key][1].logprob) < 0.03
    again, _, table_again, startup = greedy(folder, requests, dtype=dtype, calibration="auto")
    assert (again, table_again) == (got, table) and startup["calibration"] < 1.0
