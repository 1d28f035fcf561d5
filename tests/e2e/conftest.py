"""One server for all end-to-end tests: the real SmolLM2 (the fallback), because no model hub answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.server import Server, serving


@pytest.fixture(scope="session")
def server(smollm2_dir: Path) -> Iterator[Server]:
    limits = {"max_queued_requests": 32}  # so that a test can go beyond it
    with serving({"weight_dir": str(smollm2_dir.parent), "limits": limits}) as running:
        yield running
