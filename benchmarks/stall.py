"""How long others wait for a sequence whose masks take long.

    python -m benchmarks.stall [--device auto] [--shape tiny] [--batch 8] [--vocabulary 128256] [--tokens 300] [--rounds 3]
                               [--out FILE]

One sequence writes under a grammar, the others do not. The model is random (benchmarks/random_model.py), with a made-up
vocabulary (benchmarks/texts.py). Times are from token to token of the others, in ms, while the one writes: alone_*, without a
grammar; in_step_*, where its masks are filled like all others; beside_*, as the engine does it (model_core/grammar/beside.py).
Of these the median (step), the 99th percentile and the longest. *_tok_s: tokens per second of the one under the grammar. All
are medians over rounds, in which the three take turns. On a CPU nothing else may run: a mask and a step share its cores.

Written to benchmarks/results/<device>/stall.json.
"""

from __future__ import annotations

import argparse
import math
import statistics
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.random_model import SHAPES, hf_config, random_parameters
from benchmarks.report import p99, write_report
from benchmarks.texts import EOS, made_up
from model_core.engine.config import EngineConfig
from model_core.engine.engine import Engine
from model_core.engine.load import assemble, place
from model_core.engine.request import Request, SamplingParams, TokenEvent
from model_core.grammar import batch, matcher
from model_core.grammar.matcher import Compiled, Vocabulary
from model_core.grammar.spec import of_ebnf, of_schema
from model_core.model.config import ModelConfig

GRAMMARS = {
    "string of 5000": of_schema({"type": "string", "maxLength": 5000}, "response_format"),
    "string of 500": of_schema({"type": "string", "maxLength": 500}, "response_format"),
    "words": of_ebnf('root ::= (word " ")*\nword ::= [a-z]{1,5}', "structured_outputs.grammar"),
}


class Listener:
    """An engine, and when the sequences of a run got their tokens."""

    def __init__(self, shape: str, vocabulary: Vocabulary, batch: int, device: str) -> None:
        model = ModelConfig.from_hf({**hf_config(shape), "vocab_size": vocabulary.size, "max_position_embeddings": 8192})
        settings = EngineConfig(device=device, max_seqs=batch, prefix_cache=False)
        placed = place(model, settings)
        parameters = random_parameters(model, dtype=placed.dtype, device=placed.device)
        self.engine = Engine(assemble(model, parameters, settings, placed), settings, name=shape)
        self.others, self._runs = batch - 1, 0
        self._times: dict[str, list[float]] = {}
        self._last = ""
        self._done = threading.Event()
        self.engine.start(self._on_step)

    def _on_step(self, events: list[TokenEvent]) -> None:
        now = time.perf_counter()
        assert not any(event.error for event in events), events
        for event in events:
            self._times.setdefault(event.request_id, []).append(now)
            if event.finish and event.request_id == self._last:
                self._done.set()

    def run(self, tokens: int, compiled: Compiled | None) -> dict[str, float]:
        """Until the one has written its tokens, or its text is over."""
        self._runs += 1
        self._times, self._last = {}, f"{self._runs} last"
        self._done.clear()
        names = [f"{self._runs} {row}" for row in range(self.others)] + [self._last]
        most = self.engine.info.context_length - 32
        for seed, name in enumerate(names):
            params = SamplingParams(max_tokens=tokens if name == self._last else most, temperature=1.0, seed=seed,
                                    ignore_eos=True, stop_ids=(EOS,))  # fmt: skip
            grammar = compiled if name == self._last else None
            self.engine._inbox.submit(Request(name, list(range(100, 116)), params), grammar)
        while not self._done.wait(1.0):
            assert self.engine.alive, self.engine.failure
        for name in names:
            self.engine.abort(name)
        while self.engine.parts.scheduler.has_work:
            time.sleep(0.01)
        one = self._times[self._last]
        times = [at for at in self._times[names[0]] if one[0] <= at <= one[-1]]
        steps = [1e3 * (b - a) for a, b in zip(times, times[1:], strict=False)]
        return {"step_ms": round(statistics.median(steps), 1), "p99_ms": round(p99(steps), 1),
                "longest_ms": round(max(steps), 1), "tok_s": round((len(one) - 1) / (one[-1] - one[0]), 1)}  # fmt: skip


def measure(listener: Listener, vocabulary: Vocabulary, tokens: int, rounds: int) -> list[dict[str, Any]]:
    rows = []
    listener.run(tokens, None)
    for name, spec in GRAMMARS.items():
        compiled = Compiled.of(spec, vocabulary)
        runs: dict[str, list[dict[str, float]]] = {"alone": [], "in_step": [], "beside": []}
        for _ in range(rounds):
            runs["alone"].append(listener.run(tokens, None))
            with mock.patch.object(batch, "SLOW_S", math.inf), mock.patch.object(matcher, "SLOW_S", math.inf):
                compiled.slow = False
                runs["in_step"].append(listener.run(tokens, compiled))
            compiled.slow = True
            runs["beside"].append(listener.run(tokens, compiled))
        found = {f"{way}_{what}": round(statistics.median(run[what] for run in runs[way]), 1)
                 for way in runs for what in runs[way][0]}  # fmt: skip
        rows.append({"grammar": name, "vocabulary": vocabulary.size, "batch": listener.others + 1, "tokens": tokens, **found})
        print(rows[-1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    vocabulary = Vocabulary(made_up(options.vocabulary), options.vocabulary, [EOS])
    name = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    listener = Listener(options.shape, vocabulary, options.batch, name)
    rows = measure(listener, vocabulary, options.tokens, options.rounds)
    listener.engine.shutdown()
    print(write_report("stall", [{"shape": options.shape, **row} for row in rows], out=options.out))


if __name__ == "__main__":
    main()
