"""Throughput of a pile of work: 256 sequences at once, prompts and answers of 100 to 1024 tokens.

    python -m benchmarks.offline [--model tinyllama-1.1b llama-2-7b llama-3-8b] [--sequences 256]

Lengths are uniform from a generator of seed 0 (133,966 new tokens for 256 sequences), prompts are random ids, weights seeded
random. Written to benchmarks/results/<gpu>/offline.json.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import torch

from benchmarks.engines import random_engine, random_prompts
from benchmarks.random_model import SHAPES
from benchmarks.report import write_report


def work(count: int) -> tuple[list[int], list[int]]:
    """(prompt lengths, new tokens), drawn like nano-vllm's benchmark does."""
    source = random.Random(0)
    prompts = []
    for _ in range(count):
        length = source.randint(100, 1024)
        for _ in range(length):
            source.randint(0, 10000)
        prompts.append(length)
    return prompts, [source.randint(100, 1024) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["tinyllama-1.1b", "llama-2-7b", "llama-3-8b"], choices=SHAPES)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    lengths, new = work(options.sequences)
    rows = []
    for shape in options.model:
        with random_engine(shape, dtype="bfloat16", prefix_cache=False) as timed:
            best = None
            for number in range(options.rounds + 1):
                few = slice(0, 32 if number == 0 else None)  # the first round warms up
                prompts = random_prompts(len(lengths[few]), lengths[few], timed.engine.info.vocab_size, seed=number)
                seconds = timed.run(prompts, new[few]).seconds
                if number:
                    best = min(best or seconds, seconds)
            assert best is not None
            stats = timed.engine.stats()
            rows.append({"model": shape, "dtype": "bfloat16", "sequences": len(lengths), "prompt_tokens": sum(lengths),
                         "new_tokens": sum(new), "seconds": round(best, 3), "tokens_per_second": round(sum(new) / best, 1),
                         "preemptions": stats.preemptions})  # fmt: skip
            print(rows[-1], file=sys.stderr, flush=True)
    print("model            sequences   new tokens   seconds     tok/s")
    for row in rows:
        print("{model:15}{sequences:11}{new_tokens:13}{seconds:10.2f}{tokens_per_second:10.0f}".format(**row))
    print(write_report("offline", rows, out=options.out))


if __name__ == "__main__":
    main()
