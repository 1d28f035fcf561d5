"""The digest of what decides about an engine's numbers: the same from start to start, another one for other weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.random_model import write_model
from model_core.engine.config import EngineConfig
from model_core.engine.engine import Engine
from model_core.weights.sample import sample_of

CONFIG = EngineConfig(device="cpu", kv_cache_bytes=1 << 20, max_seqs=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("tiny", tmp_path_factory.mktemp("model") / "tiny", dtype=torch.float32)


def numerics(folder: Path, config: EngineConfig = CONFIG) -> str:
    return Engine.load(folder, config).info.numerics


def test_settings_that_decide_about_numbers_are_in_it_and_others_are_not(folder):
    same = numerics(folder)
    assert len(same) == 16 and same == numerics(folder, replace(CONFIG, kv_cache_bytes=1 << 21, seed=5))
    others = [replace(CONFIG, dtype="bfloat16"), replace(CONFIG, max_batch_tokens=64), replace(CONFIG, page_size=32)]
    assert len({same, *(numerics(folder, config) for config in others)}) == 4


def test_other_weights_of_the_same_shapes_are_told_apart(folder, tmp_path):
    same, other = (write_model("tiny", tmp_path / str(seed), dtype=torch.float32, seed=seed) for seed in (0, 1))
    assert sample_of(same) == sample_of(folder) != sample_of(other)
    assert numerics(same) == numerics(folder) != numerics(other)
    (file,) = other.glob("*.safetensors")
    assert sample_of(file) not in (sample_of(other), sample_of(next(same.glob("*.safetensors"))))
