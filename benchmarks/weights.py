"""How fast weights get from a file to the device: through the mapped file, and streamed with several readers and buffers.

    python -m benchmarks.weights weight/random-tinyllama-1.1b [--device cuda]

Each row is the best of three in one process, after one that is not counted; the file is in the page cache. Pinned buffers are
allocated anew each time, as at a start. Written to benchmarks/results/<device>/weights.json.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import write_report
from model_core.model.parameters import Parameters
from model_core.weights import stream
from model_core.weights.checkpoint import Checkpoint, open_checkpoint
from model_core.weights.load import fill, targets_of

READERS = (1, 2, 4, 8, 16)
CHUNKS_MIB = (2, 4, 8, 16)
_ROUNDS = 3


def seconds_of(checkpoint: Checkpoint, parameters: Parameters, *, streamed: bool) -> float:
    targets = targets_of(checkpoint.config, parameters)
    found = []
    for _ in range(1 + _ROUNDS):
        if parameters.embed.is_cuda:
            torch.cuda.synchronize()
            torch._C._host_emptyCache()  # pinned buffers of the round before
        began = time.perf_counter()
        fill(targets, checkpoint, streamed=streamed)
        if parameters.embed.is_cuda:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return min(found[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--readers", type=int, nargs="+", default=READERS)
    parser.add_argument("--chunks-mib", type=int, nargs="+", default=CHUNKS_MIB)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.folder)
    dtype = torch.bfloat16
    parameters = Parameters.empty(checkpoint.config, dtype=dtype, device=options.device)
    rows: list[dict[str, Any]] = []

    def measure(name: str, **facts: Any) -> None:
        seconds = seconds_of(checkpoint, parameters, streamed=name == "streamed")
        speed = round(checkpoint.nbytes / seconds / 1e9, 2)
        rows.append({"model": options.folder.name, "bytes": checkpoint.nbytes, "way": name, "readers": 1, "chunk_mib": 0,
                     **facts, "seconds": round(seconds, 3), "gb_per_s": speed})  # fmt: skip
        print(f"{name:9} {facts or ''} {seconds:.3f} s, {speed} GB/s", flush=True)

    measure("mapped")
    for readers in options.readers:
        for chunk in options.chunks_mib:
            stream.READERS, stream.CHUNK = readers, chunk << 20
            measure("streamed", readers=readers, chunk_mib=chunk)
    print(write_report("weights", rows, out=options.out))


if __name__ == "__main__":
    main()
