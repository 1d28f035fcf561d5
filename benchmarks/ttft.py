"""Time to first token of one prompt on an idle engine, by prompt length.

    python -m benchmarks.ttft [--model tinyllama-1.1b llama-2-7b] [--prompt 512 1024 1900]

Seeded random weights, prompts of random ids, from submitting a request to its first token event; the median of --rounds
prompts, none of which begins like another. Written to benchmarks/results/<gpu>/ttft.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch

from benchmarks.engines import random_engine, random_prompts
from benchmarks.random_model import SHAPES
from benchmarks.report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["tinyllama-1.1b", "llama-2-7b"], choices=SHAPES)
    parser.add_argument("--prompt", type=int, nargs="+", default=[512, 1024, 1900])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    rows = []
    for shape in options.model:
        with random_engine(shape, dtype="bfloat16") as timed:
            for length in options.prompt:
                times = []
                for number in range(options.rounds + 2):
                    prompt = random_prompts(1, length, timed.engine.info.vocab_size, seed=1000 * length + number)
                    (first,) = timed.run(prompt, 1).first.values()
                    times.append(1e3 * first)
                counted = times[2:]
                rows.append({"model": shape, "dtype": "bfloat16", "prompt": length,
                             "ttft_ms": round(statistics.median(counted), 3), "ttft_ms_min": round(min(counted), 3),
                             "ttft_ms_max": round(max(counted), 3)})  # fmt: skip
                print(rows[-1], file=sys.stderr, flush=True)
    print("model            prompt   TTFT ms")
    for row in rows:
        print("{model:15}{prompt:8}{ttft_ms:10.2f}".format(**row))
    print(write_report("ttft", rows, out=options.out))


if __name__ == "__main__":
    main()
