"""Models that several tests of the engine ask."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.random_model import write_model


@pytest.fixture(scope="session")
def tiny_with_end(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with an end-of-sequence id, 511, where grammars let a text end."""
    folder = write_model("tiny", tmp_path_factory.mktemp("model") / "tiny", dtype=torch.float32)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 511}))
    return folder
