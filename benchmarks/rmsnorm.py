"""RMSNorm's bandwidth: our Triton kernel, alone and fused with the residual addition, against PyTorch.

    python -m benchmarks.rmsnorm [--tokens 1 2 4 ... 32768] [--hidden 2048 4096 8192] [--out FILE]

bfloat16. native is torch.nn.functional.rms_norm (add_rmsnorm: residual.add_(x) before it), torch our reference, whose
roundings are the kernel's, op by op; copy is torch.neg, which reads and writes as much as rmsnorm must. Medians of CUDA-graph
replays over up to 16 copies of the data that are not in the L2 cache when a replay begins, gaps between launches included:
below some hundred tokens these are what counts. GB/s are the bytes that a fused kernel moves (model_core/kernels/rmsnorm.py)
over the time, for all of them; speedup is native over Triton, share of the best bandwidth measured in the same run. Written to
benchmarks/results/<gpu>/rmsnorm.json, with a chart beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.plots import COLOURS, Limit, Line, Panel, draw_panels
from benchmarks.report import write_report
from benchmarks.timing import ColdCache, bandwidths, copies
from model_core.kernels import rmsnorm

EPS = 1e-5
OPS = ("rmsnorm", "add_rmsnorm")
_MOST_COPIES = 16

Calls = dict[str, Callable[[], torch.Tensor]]


def make(op: str, tokens: int, weight: torch.Tensor) -> Calls:
    """One call of each implementation, on data of their own."""
    x, residual = (torch.randn(tokens, len(weight), dtype=weight.dtype, device=weight.device) for _ in range(2))
    if op == "rmsnorm":
        return {
            "triton": lambda: rmsnorm.rmsnorm(x, weight, EPS),
            "torch": lambda: rmsnorm.rmsnorm_torch(x, weight, EPS),
            "native": lambda: F.rms_norm(x, weight.shape, weight, EPS),
            "copy": lambda: torch.neg(x),
        }
    return {
        "triton": lambda: rmsnorm.add_rmsnorm(x, residual, weight, EPS),
        "torch": lambda: rmsnorm.add_rmsnorm_torch(x, residual, weight, EPS),
        "native": lambda: F.rms_norm(residual.add_(x), weight.shape, weight, EPS),
    }


def measure(op: str, tokens: int, hidden: int, cold: ColdCache, peak: float) -> dict[str, Any]:
    weight = torch.rand(hidden, device="cuda").bfloat16()
    nbytes = rmsnorm.bytes_moved(tokens, hidden, weight.element_size(), add=op == "add_rmsnorm")
    made = [make(op, tokens, weight) for _ in range(copies(nbytes, _MOST_COPIES))]
    us = {way: cold.microseconds([calls[way] for calls in made]) for way in made[0]}
    return row(op, hidden, tokens, us, nbytes, peak)


def row(op: str, hidden: int, tokens: int, us: dict[str, float], nbytes: int, peak: float) -> dict[str, Any]:
    gb_s = {way: nbytes / time / 1e3 for way, time in us.items()}
    return {
        "op": op, "hidden": hidden, "tokens": tokens,
        **{f"{way}_us": round(time, 2) for way, time in us.items()},
        **{f"{way}_gb_s": round(rate, 1) for way, rate in gb_s.items()},
        "speedup": round(us["native"] / us["triton"], 2), "share_of_copy": round(1e9 * gb_s["triton"] / peak, 3),
    }  # fmt: skip


def draw(report: Path, rows: list[dict[str, Any]], peak: float) -> Path | None:
    curves = [
        ("Triton", "rmsnorm", "triton", 0), ("F.rms_norm", "rmsnorm", "native", 1), ("PyTorch op by op", "rmsnorm", "torch", 2),
        ("Triton, addition fused", "add_rmsnorm", "triton", 0), ("add_, then F.rms_norm", "add_rmsnorm", "native", 1),
    ]  # fmt: skip
    panels = []
    for hidden in sorted({row["hidden"] for row in rows}):
        lines = []
        for label, op, way, colour in curves:
            chosen = [row for row in rows if row["hidden"] == hidden and row["op"] == op]
            lines.append(Line(label, [row["tokens"] for row in chosen], [row[f"{way}_gb_s"] for row in chosen],
                              dashed=op == "add_rmsnorm", colour=COLOURS[colour]))  # fmt: skip
        panels.append(Panel(f"hidden size {hidden}", lines))
    tokens = sorted({row["tokens"] for row in rows})
    return draw_panels(
        report, panels, title="RMSNorm, bfloat16: bytes moved per second", x_label="tokens", y_label="GB/s",
        x_ticks=tokens[:: max(1, len(tokens) // 4)],
        limit=Limit(f"measured bandwidth, {peak / 1e12:.2f} TB/s", peak / 1e9))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2**power for power in range(16)])
    parser.add_argument("--hidden", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device; the kernel's tests run anywhere: pytest tests/kernels")
    torch.manual_seed(0)
    found = bandwidths()
    peak = max(found.values())
    cold = ColdCache()
    rows = []
    for hidden in sorted(options.hidden):
        for op in OPS:
            for tokens in sorted(options.tokens):
                rows.append(measure(op, tokens, hidden, cold, peak))
            print(rows[-1], file=sys.stderr, flush=True)
    ways = [{"op": f"bandwidth: {way}", "gb_s": round(rate / 1e9, 1)} for way, rate in found.items()]
    path = write_report("rmsnorm", [*ways, *rows], out=options.out)
    chart = draw(path, rows, peak)
    print("bandwidth: " + ", ".join(f"{way} {rate / 1e12:.2f} TB/s" for way, rate in found.items()))
    print("op           hidden  tokens  Triton us  native us   torch us  Triton GB/s  native GB/s  speed-up  of bandwidth")
    shown = sorted(options.tokens)[::3]
    for one in (row for row in rows if row["tokens"] in shown):
        print("{op:12}{hidden:7}{tokens:8}{triton_us:11.2f}{native_us:11.2f}{torch_us:11.2f}{triton_gb_s:13.0f}"
              "{native_gb_s:13.0f}{speedup:9.2f}x{share_of_copy:14.0%}".format(**one))  # fmt: skip
    print(path)
    if chart:
        print(chart)


if __name__ == "__main__":
    main()
