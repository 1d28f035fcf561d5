"""Attention over the paged KV cache: our Triton kernels against scaled_dot_product_attention on plain tensors.

    python -m benchmarks.attention [--model tinyllama-1.1b llama-2-7b llama-3-8b] [--batch 1 8 ...] [--context 256 1024]
                                   [--prefill 512 1024 2048 4096] [--out FILE]

bfloat16, random data, pages of 16 tokens scattered over the pool. decode: one query per sequence, the kernel of the decode
graph (model_core/kernels/decode/attention.py) with its default tiles, launched as there. prefill: one prompt from its
beginning (paged_attention). SDPA gets contiguous, unpaged tensors of the same numbers (what a paged cache would first have to
be copied to), enable_gqa and, for prompts, is_causal; its time is that of FlashAttention-2, for prompts the faster of that and
cuDNN. Medians of CUDA-graph replays over data that are not in the L2 cache when a replay begins. speedup is SDPA over Triton;
error the largest difference between the two, relative to the largest value. Written to
benchmarks/results/<gpu>/attention.json, with charts beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels import varlen
from benchmarks.plots import COLOURS, Limit, Line, Panel, draw_panels
from benchmarks.random_model import SHAPES, hf_config
from benchmarks.report import write_report
from benchmarks.timing import ColdCache, copies, copy_bandwidth
from model_core.dispatch.tiles import default_tiles
from model_core.kernels import paged_attention as prefill_kernel
from model_core.kernels.decode import attention as decode_kernel
from model_core.kernels.decode.partition import DRIVERS_CHOICE, prefer_shared
from model_core.kernels.decode.products import chains_launches
from model_core.kernels.decode.state import DecodeState
from model_core.model.config import ModelConfig

PAGE = 16
DECODE_BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION}
PREFILL_BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
_MOST_COPIES = 12

Call = Callable[[], torch.Tensor]


def pages(config: ModelConfig, count: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Random keys and values, laid out as model_core/model/kv.py does on a GPU."""
    size = (count, config.num_kv_heads, PAGE, config.head_dim)
    k, v = (torch.randn(size, dtype=dtype, device=device).transpose(1, 2) for _ in range(2))
    return k, v


def plain(cache: torch.Tensor, tables: torch.Tensor, context: int) -> torch.Tensor:
    """[sequences, KV heads, context, D], contiguous: what SDPA reads."""
    return cache[tables.long()].flatten(1, 2)[:, :context].transpose(1, 2).contiguous()


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: SDPBackend, *, causal: bool) -> torch.Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def make_decode(
    config: ModelConfig, batch: int, context: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], tuple[Call, Callable[[SDPBackend], torch.Tensor]]]:
    """Makes pairs of calls (Triton, SDPA) that compute the same, [batch, heads, D], each pair on keys of its own."""
    each = -(-context // PAGE)
    state = DecodeState.empty(batch, max(each, 64), device)
    order = torch.randperm(batch * each, device=device).int()
    state.position[:batch] = context - 1
    state.block_tables[:batch, :each] = order.view(batch, each)
    rows = torch.arange(batch, device=device)
    heads, dim = config.num_heads, config.head_dim
    space = decode_kernel.SplitSpace.empty(batch, heads, config.num_kv_heads, dim, device)
    tiles = default_tiles(config, batch, dtype).attention_to(context)
    pdl = chains_launches(device)

    def pair() -> tuple[Call, Callable[[SDPBackend], torch.Tensor]]:
        q = torch.randn(batch, heads, dim, dtype=dtype, device=device)
        k_cache, v_cache = pages(config, batch * each, device, dtype)
        k, v = (plain(cache, state.block_tables[:batch, :each], context) for cache in (k_cache, v_cache))
        out = torch.empty_like(q)

        def triton() -> torch.Tensor:
            decode_kernel.attention(q, k_cache, v_cache, out, rows, state, space, scale=dim**-0.5,
                                    window=None, longest=context, tiles=tiles, pdl=pdl)  # fmt: skip
            return out

        return triton, lambda backend: sdpa(q.unsqueeze(2), k, v, backend, causal=False).squeeze(2)

    return pair


def make_prefill(
    config: ModelConfig, tokens: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], tuple[Call, Callable[[SDPBackend], torch.Tensor]]]:
    """The same for one prompt, [tokens, heads, D]."""
    batch = varlen([tokens], [tokens], device=str(device))
    heads, dim = config.num_heads, config.head_dim

    def pair() -> tuple[Call, Callable[[SDPBackend], torch.Tensor]]:
        q = torch.randn(tokens, heads, dim, dtype=dtype, device=device)
        k_cache, v_cache = pages(config, -(-tokens // PAGE), device, dtype)
        k, v = (plain(cache, batch.block_tables, tokens) for cache in (k_cache, v_cache))
        across = q.transpose(0, 1).unsqueeze(0).contiguous()
        return (lambda: prefill_kernel.paged_attention(q, k_cache, v_cache, batch, scale=dim**-0.5),
                lambda backend: sdpa(across, k, v, backend, causal=True)[0].transpose(0, 1))  # fmt: skip

    return pair


def measure(
    make: Callable[[], tuple[Call, Callable[[SDPBackend], torch.Tensor]]], nbytes: int, backends: dict[str, SDPBackend],
    cold: ColdCache, shared: int = DRIVERS_CHOICE,
) -> dict[str, Any]:  # fmt: skip
    """Microseconds of both, and the largest difference between them. shared: what our kernel prefers, see partition.py."""
    made = [make() for _ in range(copies(nbytes, _MOST_COPIES))]
    actual = made[0][0]().float()
    with prefer_shared(shared):
        triton = cold.microseconds([pair[0] for pair in made])
    found: dict[str, float] = {}
    error = 0.0
    for name, backend in backends.items():
        try:
            expected = made[0][1](backend).float()
        except RuntimeError as reason:
            print(f"SDPA has no {name} here: {str(reason).splitlines()[0]}", file=sys.stderr)
            continue
        error = max(error, ((actual - expected).abs().max() / expected.abs().max()).item())
        found[name] = cold.microseconds([lambda pair=pair, chosen=backend: pair[1](chosen) for pair in made])  # type: ignore[misc]
    best = min(found, key=lambda name: found[name]) if found else None
    return {"triton_us": round(triton, 2), "sdpa_us": round(found[best], 2) if best else None, "sdpa_backend": best,
            "speedup": round(found[best] / triton, 2) if best else None, "error": round(error, 5)}  # fmt: skip


def rate(amount: int, us: float | None) -> float | None:
    """amount / us in units of 10^9 a second."""
    return None if us is None else round(amount / us / 1e3, 1)


def decode_rows(shape: str, options: argparse.Namespace, cold: ColdCache, peak: float) -> Iterator[dict[str, Any]]:
    config = ModelConfig.from_hf(hf_config(shape))
    for context in sorted(options.context):
        for batch in sorted(options.batch):
            nbytes = decode_kernel.bytes_moved([context] * batch, config.num_heads, config.num_kv_heads, config.head_dim, 2)
            if 4 * nbytes > torch.cuda.mem_get_info()[0]:  # paged, plain, and a copy of each while they are made
                print(f"{shape}: batch {batch} with {context} keys does not fit", file=sys.stderr)
                continue
            make = make_decode(config, batch, context, torch.device("cuda"), torch.bfloat16)
            row = measure(make, nbytes, DECODE_BACKENDS, cold, default_tiles(config, batch, torch.bfloat16).shared)
            gb_s = rate(nbytes, row["triton_us"])
            yield {"kind": "decode", "model": shape, "batch": batch, "context": context, **row, "gb_s": gb_s,
                   "sdpa_gb_s": rate(nbytes, row["sdpa_us"]), "share_of_copy": round(1e9 * (gb_s or 0) / peak, 3)}  # fmt: skip


def prefill_rows(shape: str, options: argparse.Namespace, cold: ColdCache) -> Iterator[dict[str, Any]]:
    config = ModelConfig.from_hf(hf_config(shape))
    for tokens in sorted(options.prefill):
        batch = varlen([tokens], [tokens], device="cpu")
        flops = prefill_kernel.flops(batch, config.num_heads, config.head_dim)
        nbytes = prefill_kernel.bytes_moved(batch, config.num_heads, config.num_kv_heads, config.head_dim, 2)
        make = make_prefill(config, tokens, torch.device("cuda"), torch.bfloat16)
        row = measure(make, nbytes, PREFILL_BACKENDS, cold)
        yield {"kind": "prefill", "model": shape, "tokens": tokens, **row, "tflops": rate(flops // 1000, row["triton_us"]),
               "sdpa_tflops": rate(flops // 1000, row["sdpa_us"])}  # fmt: skip


def draw_decode(report: Path, rows: list[dict[str, Any]], peak: float) -> Path | None:
    panels = []
    for shape in dict.fromkeys(row["model"] for row in rows):
        lines = []
        for number, context in enumerate(sorted({row["context"] for row in rows}, reverse=True)):
            chosen = [row for row in rows if row["model"] == shape and row["context"] == context]
            for label, key, dashed in (("Triton", "gb_s", False), ("SDPA", "sdpa_gb_s", True)):
                at = [row for row in chosen if row[key] is not None]
                lines.append(Line(f"{label}, {context} keys", [row["batch"] for row in at], [row[key] for row in at],
                                  dashed=dashed, colour=COLOURS[number]))  # fmt: skip
        panels.append(Panel(shape, lines))
    batches = sorted({row["batch"] for row in rows})
    return draw_panels(
        report, panels, title="Decode attention: Triton on pages, SDPA on contiguous tensors", x_label="sequences",
        y_label="GB/s", x_ticks=batches, limit=Limit(f"measured bandwidth, {peak / 1e12:.2f} TB/s", peak / 1e9),
        out=report.with_name(f"{report.stem}-decode.png"))  # fmt: skip


def draw_prefill(report: Path, rows: list[dict[str, Any]]) -> Path | None:
    panels = []
    for shape in dict.fromkeys(row["model"] for row in rows):
        lines = []
        for label, key, dashed in (("Triton, paged", "tflops", False), ("SDPA, contiguous", "sdpa_tflops", True)):
            at = [row for row in rows if row["model"] == shape and row[key] is not None]
            lines.append(Line(label, [row["tokens"] for row in at], [row[key] for row in at], dashed=dashed))
        panels.append(Panel(shape, lines))
    tokens = sorted({row["tokens"] for row in rows})
    return draw_panels(report, panels, title="Causal attention over a prompt, bfloat16", x_label="tokens", y_label="TFLOP/s",
                       x_ticks=tokens, out=report.with_name(f"{report.stem}-prefill.png"))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["tinyllama-1.1b", "llama-2-7b", "llama-3-8b"], choices=SHAPES)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--context", type=int, nargs="+", default=[256, 1024], help="keys of each decoding sequence")
    parser.add_argument("--prefill", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="tokens of a prompt")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device; the kernels' tests run anywhere: pytest tests/kernels")
    torch.manual_seed(0)
    peak = copy_bandwidth()
    cold = ColdCache()
    decodes: list[dict[str, Any]] = []
    prefills: list[dict[str, Any]] = []
    for shape in options.model:
        for rows, found in ((decodes, decode_rows(shape, options, cold, peak)), (prefills, prefill_rows(shape, options, cold))):
            for row in found:
                rows.append(row)
                print(row, file=sys.stderr, flush=True)
                torch.cuda.empty_cache()
    path = write_report("attention", [*decodes, *prefills], out=options.out)
    charts = [draw_decode(path, decodes, peak), draw_prefill(path, prefills)]
    print(f"bandwidth {peak / 1e12:.2f} TB/s")
    print("model           sequences     keys  Triton us    SDPA us  speed-up  Triton GB/s  SDPA GB/s  of bandwidth   error")
    for row in decodes:
        print("{model:15}{batch:10}{context:9}{triton_us:11.2f}{sdpa:>11}{ratio:>10}{gb_s:13.0f}{rate:>11}"
              "{share_of_copy:14.0%}{error:8.4f}".format(**row, **shown(row, "sdpa_gb_s")))  # fmt: skip
    print("model              tokens  Triton us    SDPA us  speed-up  Triton TFLOP/s  SDPA TFLOP/s  backend   error")
    for row in prefills:
        print("{model:15}{tokens:10}{triton_us:11.2f}{sdpa:>11}{ratio:>10}{tflops:16.0f}{rate:>14}{sdpa_backend!s:>9}{error:8.4f}"
              .format(**row, **shown(row, "sdpa_tflops")))  # fmt: skip
    for file in (path, *charts):
        if file:
            print(file)


def shown(row: dict[str, Any], key: str) -> dict[str, str]:
    """SDPA's columns, which may be empty."""
    if row["sdpa_us"] is None:
        return {"sdpa": "-", "ratio": "-", "rate": "-"}
    return {"sdpa": f"{row['sdpa_us']:.2f}", "ratio": f"{row['speedup']:.2f}x", "rate": f"{row[key]:.0f}"}


if __name__ == "__main__":
    main()
