"""What a grammar adds to a step of the engine on a GPU, whose sequences write given texts."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

from benchmarks.random_model import hf_config, random_parameters
from benchmarks.report import p99
from benchmarks.texts import EOS, GRAMMARS, endless, numbers_of
from model_core.cache.pages import PagePool
from model_core.dispatch.ops import Ops
from model_core.dispatch.tiles import default_tiles
from model_core.engine.clock import MOST_AHEAD
from model_core.engine.config import EngineConfig
from model_core.engine.engine import Engine
from model_core.engine.flight import InFlight
from model_core.engine.graph_runner import GraphRunner
from model_core.engine.load import Parts, place
from model_core.engine.plan import StepPlan
from model_core.engine.request import Request, SamplingParams, TokenEvent, TokenLogprobs
from model_core.engine.scheduler import Scheduler
from model_core.grammar.batch import MaskFiller
from model_core.grammar.matcher import Compiled, Vocabulary
from model_core.model.config import ModelConfig
from model_core.model.kv import KVCache
from model_core.model.llama import Llama

_SPAN = 8


class Dictation:
    """An engine on a GPU whose sequences write texts, whatever it samples for them: TinyLlama, random, with a vocabulary."""

    def __init__(self, vocabulary: Vocabulary, batch: int, tokens: int, shape: str = "tinyllama-1.1b") -> None:
        model = ModelConfig.from_hf({**hf_config(shape), "vocab_size": vocabulary.size})
        page = EngineConfig().page_size
        size = (1 + batch * -(-(tokens + 32) // page)) * page * model.kv_bytes_per_token(4)
        settings = EngineConfig(max_seqs=batch, kv_cache_bytes=size, prefix_cache=False)
        placed = place(model, settings)
        parameters = random_parameters(model, dtype=placed.dtype, device=placed.device)
        ops = Ops(placed.device).captured()
        assert ops is not None, "no captured graphs here"
        llama = Llama(model, parameters, ops, placed.limits.max_context)
        kv = KVCache.empty(model, placed.ledger.num_pages, page, llama.dtype, placed.device)
        # one bucket of rows, with the tiles of a start without calibration: what else could be launched need not be compiled
        runner = GraphRunner(llama, ops, kv, placed.limits, page, placed.device,
                             tiles={batch: default_tiles(model, batch, llama.dtype)})  # fmt: skip
        runner.warm_up(placed.limits.max_batch_tokens)
        scheduler = Scheduler(PagePool(placed.ledger.num_pages, page, prefix_cache=False), placed.limits)
        parts = Parts(model, placed.dtype, placed.device, placed.limits, placed.ledger, ops, runner, scheduler)
        self.engine = Engine(parts, settings, name=shape)
        self.engine._most_ahead = MOST_AHEAD
        self.batch, self.texts = batch, dict[str, list[int]]()
        self._launch = runner.launch
        runner.launch = self._dictated  # type: ignore[method-assign]
        self._times: list[float] = []
        self._done = threading.Event()
        self.engine.start(self._on_step)

    def _dictated(self, plan: StepPlan, proceed: Callable[[], object] = int) -> InFlight:
        flight = self._launch(plan, proceed)
        collect = flight.collect

        def replaced() -> tuple[list[int], dict[int, list[TokenLogprobs]]]:
            tokens, logprobs = collect()
            written = [(self.texts[seq.request_id], seq.num_output) for seq in plan.sampling]
            return [token if token < 0 else text[min(at, len(text) - 1)]
                    for token, (text, at) in zip(tokens, written, strict=True)], logprobs  # fmt: skip

        flight.collect = replaced  # type: ignore[method-assign]
        return flight

    def _on_step(self, events: list[TokenEvent]) -> None:
        if len(events) == self.batch:
            self._times.append(time.perf_counter())
        assert not any(event.error for event in events), events
        if any(event.finish for event in events):
            self._done.set()

    def step_us(self, texts: list[list[int]], compiled: Compiled | None) -> float:
        """Time from step to step of a batch that writes these texts, all of one length: median over spans of _SPAN steps, since
        tokens of several steps may be read at once."""
        params = SamplingParams(max_tokens=len(texts[0]), ignore_eos=True, stop_ids=(EOS,))
        self.texts |= {f"{len(self.texts) + row}": text for row, text in enumerate(texts)}
        self._times.clear()
        self._done.clear()
        for name in list(self.texts)[-len(texts) :]:
            self.engine._inbox.submit(self.engine._seeded(Request(name, list(range(100, 116)), params)), compiled)
        while not self._done.wait(1.0):
            assert self.engine.alive, self.engine.failure
        while self.engine.parts.scheduler.has_work:
            time.sleep(0.01)
        times = self._times[len(self._times) // 4 :]
        assert len(times) > 2 * _SPAN, "too few steps"
        return 1e6 * statistics.median(b - a for a, b in zip(times, times[_SPAN:], strict=False)) / _SPAN


def added(vocabulary: Vocabulary, batch: int, steps: int, shape: str = "tinyllama-1.1b") -> list[dict[str, Any]]:
    """On a GPU: rows of the report."""
    numbers, rows = numbers_of(vocabulary), []
    dictation = Dictation(vocabulary, batch, steps, shape)
    fill, spent = MaskFiller.fill, list[float]()

    def timed(*args: Any) -> None:
        began = time.perf_counter()
        fill(*args)
        spent.append(1e6 * (time.perf_counter() - began))

    with mock.patch.object(MaskFiller, "fill", timed):
        for name, (spec, _) in GRAMMARS.items():
            texts = [endless(name, row, steps, numbers) for row in range(batch)]
            began = time.perf_counter()
            compiled = Compiled.of(spec, vocabulary)
            compile_ms = 1e3 * (time.perf_counter() - began)
            dictation.step_us(texts, compiled)  # graphs of prompts are captured, memory is allocated
            without = dictation.step_us(texts, None)
            spent.clear()
            under = dictation.step_us(texts, compiled)
            rows.append({
                "grammar": name, "vocabulary": vocabulary.size, "batch": batch, "device": "cuda", "steps": steps,
                "compile_ms": round(compile_ms, 1), "without_us": round(without, 1), "step_us": round(under, 1),
                "added_us": round(under - without, 1), "host_us": round(statistics.median(spent), 1),
                "host_us_p99": round(p99(spent), 1),
            })  # fmt: skip
    dictation.engine.shutdown()
    return rows
