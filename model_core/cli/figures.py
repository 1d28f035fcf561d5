"""What a generation did, in figures: tokens/s, time to first token, bytes read per second."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from model_core.model.config import ModelConfig


@dataclass
class Figures:
    """Filled in while tokens come. Times in seconds of time.perf_counter()."""

    model: ModelConfig
    weight_bytes: int  # read by one step
    kv_element_bytes: int
    prompt_tokens: int
    cached_tokens: int = 0
    tokens: int = 0
    begun: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    last: float = 0.0

    def count(self, tokens: int) -> None:
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.tokens += tokens

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: tokens after the first over the time after the first."""
        return (self.tokens - 1) / (self.last - self.first) if self.tokens > 1 else 0.0

    @property
    def bytes_per_second(self) -> float:
        """A decode step reads every weight once, and the keys and values of all tokens before it."""
        steps = self.tokens - 1
        if steps < 1:
            return 0.0
        mean_context = self.prompt_tokens + 1 + (steps - 1) / 2
        step = self.weight_bytes + mean_context * self.model.kv_bytes_per_token(self.kv_element_bytes)
        return steps * step / (self.last - self.first)

    def __str__(self) -> str:
        if not self.tokens:
            return f"[{self.prompt_tokens} prompt tokens, no answer]"
        cached = f" ({self.cached_tokens} from the cache)" if self.cached_tokens else ""
        return (f"[{self.prompt_tokens} prompt tokens{cached}, {self.tokens} new ones; "
                f"TTFT {1e3 * (self.first - self.begun):.0f} ms, {self.tokens_per_second:.1f} tokens/s, "
                f"{self.bytes_per_second / 1e9:.1f} GB/s]")  # fmt: skip
