"""Time to first token of one prompt on an idle engine, by prompt length.

    python -m benchmarks.ttft [--model tinyllama-1.1b llama-2-7b llama-3-8b] [--prompt 512 1024 1900] [--pause 0.25]

Seeded random weights, prompts of random ids, from submitting a request to its first token event; the median of --rounds
prompts, none of which begins like another. ttft_ms: with --pause seconds of idleness before each prompt. back_to_back_ms:
without, which a GPU at its power limit feels (Llama-2-7B's 1900 tokens: 37.2 ms on an H100 after a pause, 42.2 in a row, the
same graph). Written to benchmarks/results/<gpu>/ttft.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

from benchmarks.engines import TimedEngine, random_engine, random_prompts
from benchmarks.random_model import SHAPES
from benchmarks.report import write_report


def first_token_ms(timed: TimedEngine, length: int, rounds: int, pause: float) -> list[float]:
    """Of `rounds` prompts, after two that do not count."""
    times = []
    for number in range(rounds + 2):
        (prompt,) = random_prompts(1, length, timed.engine.info.vocab_size, seed=hash((length, number, pause)))
        time.sleep(pause)
        (first,) = timed.run([prompt], 1).first.values()
        times.append(1e3 * first)
    return times[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["tinyllama-1.1b", "llama-2-7b", "llama-3-8b"], choices=SHAPES)
    parser.add_argument("--prompt", type=int, nargs="+", default=[512, 1024, 1900])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--pause", type=float, default=0.25)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    rows = []
    for shape in options.model:
        with random_engine(shape, dtype="bfloat16") as timed:
            for length in options.prompt:
                busy, idle = (first_token_ms(timed, length, options.rounds, pause) for pause in (0.0, options.pause))
                rows.append({"model": shape, "dtype": "bfloat16", "prompt": length,
                             "ttft_ms": round(statistics.median(idle), 3), "ttft_ms_min": round(min(idle), 3),
                             "ttft_ms_max": round(max(idle), 3), "back_to_back_ms": round(statistics.median(busy), 3),
                             "pause_s": options.pause})  # fmt: skip
                print(rows[-1], file=sys.stderr, flush=True)
    print("model            prompt   TTFT ms   back to back")
    for row in rows:
        print("{model:15}{prompt:8}{ttft_ms:10.2f}{back_to_back_ms:15.2f}".format(**row))
    print(write_report("ttft", rows, out=options.out))


if __name__ == "__main__":
    main()
