"""Every op on a GPU: Triton against PyTorch, in microseconds, GB/s and roundings of error.

    python -m benchmarks.kernels [--out FILE]

Shapes of TinyLlama-1.1B and Llama-2-7B in bfloat16. Each time is the median of CUDA-graph replays over several copies
of the data, more than the L2 cache holds; share is of the copy bandwidth measured in the same run. error is the largest
difference from float64, in units of bfloat16's eps times the largest value. Written to
benchmarks/results/<gpu>/kernels.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.report import write_report
from benchmarks.timing import copies, copy_bandwidth, microseconds
from model_core.kernels import paged_attention as attention
from model_core.kernels import rmsnorm, rope_kv, swiglu
from model_core.kernels.paged_attention_torch import paged_attention_torch
from model_core.model.batch import Batch

TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
SHAPES = {"tinyllama-1.1b": (2048, 5632, 32, 4, 64), "llama-2-7b": (4096, 11008, 32, 32, 128)}
_MOST_COPIES = 20
_PAGE = 16


@dataclass
class Case:
    """make() -> (Triton call, PyTorch call, exact value in float64), each call on data of its own."""

    op: str
    model: str
    size: str
    nbytes: int
    flops: int
    make: Callable[[], tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor], torch.Tensor]]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def elementwise(model: str) -> Iterator[Case]:
    hidden, inner, heads, kv_heads, dim = SHAPES[model]
    for tokens in TOKENS:
        weight = torch.rand(hidden, device="cuda").bfloat16()

        def norm(tokens: int = tokens, weight: torch.Tensor = weight) -> Any:
            x = randn(tokens, hidden)
            wide = x.double()
            exact = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
            return lambda: rmsnorm.rmsnorm(x, weight, 1e-5), lambda: rmsnorm.rmsnorm_torch(x, weight, 1e-5), exact

        def add(tokens: int = tokens, weight: torch.Tensor = weight) -> Any:
            x, residual, other = randn(tokens, hidden), randn(tokens, hidden), randn(tokens, hidden)
            wide = (x + residual).double()
            exact = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
            return (lambda: rmsnorm.add_rmsnorm(x, residual, weight, 1e-5),
                    lambda: rmsnorm.add_rmsnorm_torch(x, other, weight, 1e-5), exact)  # fmt: skip

        def mlp(tokens: int = tokens) -> Any:
            x = randn(tokens, 2 * inner)
            gate, up = x.double().chunk(2, -1)
            return lambda: swiglu.swiglu(x), lambda: swiglu.swiglu_torch(x), F.silu(gate) * up

        def rope(tokens: int = tokens) -> Any:
            fused = randn(tokens, heads + 2 * kv_heads, dim)
            q, k, v = fused.split((heads, kv_heads, kv_heads), dim=1)
            angles = torch.rand(8192, dim // 2, device="cuda")
            table = torch.cat((angles.cos(), angles.sin()), -1)
            positions = slots = torch.arange(tokens, device="cuda")
            cache = torch.zeros(-(-tokens // _PAGE), kv_heads, _PAGE, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
            a, b = q.double().chunk(2, -1)
            cos, sin = table[positions].double().unsqueeze(1).chunk(2, -1)
            exact = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

            def call(op: Callable[..., None]) -> torch.Tensor:
                op(q, k, v, positions, table, cache, cache, slots)
                return q

            return lambda: call(rope_kv.rope_kv_write), lambda: call(rope_kv.rope_kv_write_torch), exact

        size = f"{tokens} tokens"
        yield Case("rmsnorm", model, size, rmsnorm.bytes_moved(tokens, hidden, 2), rmsnorm.flops(tokens, hidden), norm)
        yield Case("add_rmsnorm", model, size, rmsnorm.bytes_moved(tokens, hidden, 2, add=True),
                   rmsnorm.flops(tokens, hidden, add=True), add)  # fmt: skip
        yield Case("swiglu", model, size, swiglu.bytes_moved(tokens, inner, 2), swiglu.flops(tokens, inner), mlp)
        yield Case("rope_kv_write", model, size, rope_kv.bytes_moved(tokens, heads, kv_heads, dim, 2),
                   rope_kv.flops(tokens, heads, kv_heads, dim), rope)  # fmt: skip


def attention_cases(model: str) -> Iterator[Case]:
    _, _, heads, kv_heads, dim = SHAPES[model]
    decodes = [(f"decode {rows} x {context}", [1] * rows, [context] * rows)
               for rows in (1, 8, 32, 128) for context in (512, 2048)]  # fmt: skip
    prefills = [(f"prefill {length}", [length], [length]) for length in (512, 2048)] + [("chunk 512 of 2048", [512], [2048])]
    for size, queries, contexts in decodes + prefills:

        def make(queries: list[int] = queries, contexts: list[int] = contexts) -> Any:
            batch = varlen(queries, contexts)
            pages = int(batch.block_tables.max()) + 1
            k, v = (randn(pages, kv_heads, _PAGE, dim).transpose(1, 2) for _ in range(2))
            q = randn(sum(queries), heads, dim)
            arguments = (q, k, v, batch)
            first = contexts[0]
            slots = batch.block_tables[0, torch.arange(first, device="cuda") // _PAGE].long()
            keys, values = (x[slots, torch.arange(first, device="cuda") % _PAGE].double() for x in (k, v))
            group = heads // kv_heads
            scores = torch.einsum("qhd,nhd->hqn", q[: queries[0]].double(), keys.repeat_interleave(group, 1)) * dim**-0.5
            position = torch.arange(first - queries[0], first, device="cuda")[:, None]
            scores.masked_fill_(torch.arange(first, device="cuda")[None, :] > position, -torch.inf)
            exact = torch.einsum("hqn,nhd->qhd", scores.softmax(-1), values.repeat_interleave(group, 1))
            return (lambda: attention.paged_attention(*arguments, scale=dim**-0.5),
                    lambda: paged_attention_torch(*arguments, scale=dim**-0.5), exact)  # fmt: skip

        batch = varlen(queries, contexts, device="cpu")
        yield Case("paged_attention", model, size, attention.bytes_moved(batch, heads, kv_heads, dim, 2),
                   attention.flops(batch, heads, dim), make)  # fmt: skip


def varlen(queries: list[int], contexts: list[int], device: str = "cuda") -> Batch:
    """A batch over scattered pages."""
    counts = [-(-context // _PAGE) for context in contexts]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).int()
    tables = torch.zeros(len(queries), max(counts), dtype=torch.int32)
    for row, part in enumerate(order.split(counts)):
        tables[row, : len(part)] = part
    starts = torch.tensor([0, *queries]).cumsum(0)
    positions = torch.cat([torch.arange(c - q, c) for q, c in zip(queries, contexts, strict=True)])
    return Batch(
        token_ids=positions.to(device), positions=positions.to(device), slot_mapping=positions.to(device),
        query_start=starts.int().to(device), context_len=torch.tensor(contexts, dtype=torch.int32, device=device),
        block_tables=tables.to(device), logit_rows=(starts[1:] - 1).to(device), query_lens=queries, context_lens=contexts,
        num_decodes=sum(q == 1 for q in queries))  # fmt: skip


def measure(case: Case, peak: float) -> dict[str, Any]:
    made = [case.make() for _ in range(copies(case.nbytes, _MOST_COPIES))]
    exact = made[0][2]
    actual = made[0][0]()[: exact.shape[0]].double()
    error = ((actual - exact).abs().max() / exact.abs().max() / torch.finfo(torch.bfloat16).eps).item()
    triton = microseconds([row[0] for row in made])
    torch_us = microseconds([row[1] for row in made])
    return {
        "op": case.op, "model": case.model, "size": case.size, "triton_us": round(triton, 2), "torch_us": round(torch_us, 2),
        "speedup": round(torch_us / triton, 2), "gb_s": round(case.nbytes / triton / 1e3, 1),
        "tflops": round(case.flops / triton / 1e6, 2), "share_of_copy": round(case.nbytes / triton * 1e6 / peak, 3),
        "error_eps": round(error, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device; the kernels' tests run anywhere: pytest tests/kernels")
    torch.manual_seed(0)
    peak = copy_bandwidth()
    cases = [case for model in SHAPES for case in (*elementwise(model), *attention_cases(model))]
    rows: list[dict[str, Any]] = [{"op": "copy", "gb_s": round(peak / 1e9, 1)}]
    print(f"copy bandwidth {peak / 1e12:.2f} TB/s")
    print("op               model           size               Triton us  torch us      GB/s  error")
    for number, case in enumerate(cases):
        rows.append(row := measure(case, peak))
        print("{op:16} {model:15} {size:18} {triton_us:10.2f}{torch_us:10.2f}{gb_s:10.0f}{error_eps:7.2f}".format(**row))
        print(f"{number + 1}/{len(cases)}", end="\r", file=sys.stderr)
    print(write_report("kernels", rows, out=options.out))


if __name__ == "__main__":
    main()
