"""An engine over random weights of a real model's shape, and batches of requests timed in it."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from benchmarks.random_model import hf_config, random_parameters
from model_core.engine.config import EngineConfig
from model_core.engine.engine import Engine
from model_core.engine.load import assemble, place
from model_core.engine.request import Request, SamplingParams, TokenEvent
from model_core.model.config import ModelConfig


@dataclass
class Timed:
    """One batch of requests. Seconds since it was submitted: of each request's first token, and of the last of all."""

    tokens: int = 0
    first: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


class TimedEngine:
    """An engine that runs one batch after the other."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._left: set[str] = set()
        self._done = threading.Event()
        self._begun = 0.0
        self._number = 0
        self._timed = Timed()
        engine.start(self._on_step)

    def run(self, prompts: Sequence[list[int]], new_tokens: Sequence[int] | int) -> Timed:
        """All prompts at once, greedy, end-of-sequence ignored. Raises RuntimeError if one does not end as asked."""
        lengths = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else new_tokens
        requests = []
        for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            params = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
            requests.append(Request(f"{self._number}-{index}", prompt, params))
        self._number += 1
        self._timed, self._left = Timed(), {request.request_id for request in requests}
        self._done.clear()
        self._begun = time.perf_counter()
        for request in requests:
            self.engine.submit(request)
        while not self._done.wait(1.0):
            if not self.engine.alive:
                raise RuntimeError(f"the engine failed: {self.engine.failure}")
        if self._timed.tokens != sum(lengths):
            raise RuntimeError(f"{self._timed.tokens} tokens came, {sum(lengths)} were asked for")
        return self._timed

    def close(self) -> None:
        """Afterwards there is no engine, whoever keeps this."""
        self.engine.shutdown()
        del self.engine

    def _on_step(self, events: list[TokenEvent]) -> None:
        now = time.perf_counter() - self._begun
        for event in events:
            self._timed.tokens += len(event.token_ids)
            self._timed.first.setdefault(event.request_id, now)
            if event.finish:
                self._left.discard(event.request_id)
        if not self._left:
            self._timed.seconds = now
            self._done.set()


@contextmanager
def random_engine(shape: str, **config: object) -> Iterator[TimedEngine]:
    """An engine over seeded random weights, all graphs captured, closed afterwards."""
    model = ModelConfig.from_hf(hf_config(shape))
    settings = EngineConfig(**config)  # type: ignore[arg-type]
    placed = place(model, settings)
    parameters = random_parameters(model, dtype=placed.dtype, device=placed.device)
    engine = Engine(assemble(model, parameters, settings, placed), settings, name=shape)
    timed = TimedEngine(engine)
    try:
        while engine.alive and engine.stats().graphs_to_capture:
            time.sleep(0.01)
        yield timed
    finally:
        timed.close()
        del engine, parameters
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def random_prompts(count: int, lengths: Sequence[int] | int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Prompts of random ids; no two begin alike, so none is a prefix hit of another."""
    source = random.Random(seed)
    sizes = [lengths] * count if isinstance(lengths, int) else lengths
    return [[source.randrange(vocab_size) for _ in range(size)] for size in sizes]
