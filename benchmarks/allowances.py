"""API keys of a server under test, and whether what their holders got is what their limits allow."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from benchmarks.ask import Ask
from benchmarks.exchange import Reply

OPEN, FEW, POOR, ONE = "sk-open", "sk-few", "sk-poor", "sk-one"  # no limit; of requests, of tokens, at a time
REQUESTS, TOKENS = 6, 120  # a minute
ACCESS: dict[str, Any] = {"keys": [
    {"name": "open", "key": OPEN}, {"name": "few", "key": FEW, "requests_per_minute": REQUESTS},
    {"name": "poor", "key": POOR, "tokens_per_minute": TOKENS}, {"name": "one", "key": ONE, "concurrent_requests": 1},
]}  # fmt: skip


@dataclass
class Allowances:
    """Counts answers by key. most: tokens that one request can use."""

    most: int
    let_in: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    tokens: int = 0  # of POOR

    def count(self, ask: Ask, reply: Reply) -> None:
        """Of a request that was read to its end. Raises AssertionError."""
        if ask.key not in (FEW, POOR, ONE):
            return
        if reply.status == 429:
            self.refused[ask.key] += 1
            return
        self.let_in[ask.key] += 1
        unit, limit = ("requests", REQUESTS) if ask.key == FEW else ("tokens", TOKENS)
        if ask.key != ONE:
            assert reply.header(f"x-ratelimit-limit-{unit}") == str(limit)
            assert 0 <= int(reply.header(f"x-ratelimit-remaining-{unit}") or -1) <= limit
        if ask.key == POOR:
            self.tokens += json.loads(reply.body)["usage"]["total_tokens"]

    def faults(self, seconds: float, at_once: int) -> list[str]:
        """After so many seconds with so many requests at once: a bucket gives what it held at first and what came since."""
        requests, tokens = (limit * (1 + seconds / 60) for limit in (REQUESTS, TOKENS))
        asked = self.let_in[FEW] + self.refused[FEW]
        found = []
        if not min(asked, REQUESTS) <= self.let_in[FEW] <= requests + 1:
            found.append(f"{self.let_in[FEW]} of {asked} requests let in, {requests:.1f} allowed in {seconds:.1f} s")
        # a request is charged when it begins and ends, so that each at once may overdraw
        if self.tokens > tokens + at_once * self.most or (self.refused[POOR] and self.tokens < TOKENS - self.most):
            found.append(f"{self.tokens} tokens given, {tokens:.0f} allowed in {seconds:.1f} s")
        return found
