"""The soak (benchmarks/soak.py) in short, over the real SmolLM2: a crowd of good, broken, slow and vanishing clients.

Comes before test_serve.py, which ends the server.
"""

from __future__ import annotations

import pytest

from benchmarks.soak import make_traffic, soak

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def test_nothing_is_lost_and_nothing_breaks(server):
    traffic = make_traffic(server, seed=0, max_body=4 << 20, max_tokens=6)
    tally, _ = soak(server, traffic, requests=120, burst=(80, 2))
    assert not tally.faults, "\n".join(tally.faults)
    assert tally.statuses["200"] > 40 and tally.statuses["left"] > 10 and tally.statuses["503"] > 0
