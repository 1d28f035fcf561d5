"""From a checkpoint on disk to a runner that is ready: the itemised start-up of an engine."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from model_core import head_start
from model_core.cache.pages import PagePool
from model_core.dispatch import compile as compiler
from model_core.dispatch.ops import Ops
from model_core.engine.config import EngineConfig
from model_core.engine.graph_runner import GraphRunner
from model_core.engine.memory import Ledger, available_host_memory, plan_memory
from model_core.engine.plan import Limits
from model_core.engine.runner import Runner, StepRunner
from model_core.engine.scheduler import Scheduler
from model_core.engine.startup import StartUp
from model_core.errors import CheckpointError, ConfigError
from model_core.grammar.compiler import Compiler
from model_core.kernels.linear import packing_works
from model_core.model.config import ModelConfig
from model_core.model.kv import KVCache
from model_core.model.llama import Llama
from model_core.model.parameters import Parameters
from model_core.weights.checkpoint import Checkpoint, open_checkpoint
from model_core.weights.load import empty_parameters, fill, targets_of
from model_core.weights.progress import Progress, format_bytes

if TYPE_CHECKING:
    from model_core.grammar.matcher import Vocabulary

logger = logging.getLogger("mini_llm.engine")


@dataclass
class Parts:
    """What an engine is made of, and the steps of making it."""

    model: ModelConfig
    dtype: torch.dtype
    device: torch.device
    limits: Limits
    ledger: Ledger
    ops: Ops
    runner: StepRunner
    scheduler: Scheduler
    startup: StartUp = field(default_factory=StartUp)
    grammars: Compiler = field(default_factory=lambda: Compiler(_no_tokens))  # an engine of parameters alone has none


@dataclass(frozen=True)
class Placement:
    """Where and how large: EngineConfig with every "auto" decided for this machine and model."""

    device: torch.device
    dtype: torch.dtype
    limits: Limits
    ledger: Ledger


def _no_tokens() -> Vocabulary:
    raise CheckpointError("it was loaded without its tokenizer")


def gpu_names() -> list[str]:
    """The GPUs that this process could use."""
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def place(model: ModelConfig, config: EngineConfig) -> Placement:
    """Decide device, dtype, limits and the memory ledger. Raises ConfigError and OutOfMemory."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda but torch sees no GPU: set device to auto or cpu, or check nvidia-smi")
    if config.deterministic and name == "cpu" and not packing_works():
        raise ConfigError("deterministic: true needs a GPU, or an x86 CPU with AVX2: other products may round by the number of "
                          "rows; leave it off here")
    device = torch.device("cuda:0" if name == "cuda" else "cpu")
    dtype_name = config.dtype if config.dtype != "auto" else ("bfloat16" if name == "cuda" else "float32")
    dtype: torch.dtype = getattr(torch, dtype_name)
    max_seqs = config.max_seqs or (256 if name == "cuda" else 32)
    max_batch_tokens = config.max_batch_tokens or max(max_seqs, 4096 if name == "cuda" else 256)
    if config.context_length and config.context_length > model.context_length:
        raise ConfigError(f"context_length is {config.context_length}, this model's is {model.context_length}: "
                          f"set it to at most that")
    if name == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        available = int(min(free, total * config.gpu_memory_fraction))
    else:
        available = available_host_memory()
    # A CPU computes in float32 whatever the weights are kept in (kernels/linear.py), and so its pages are float32.
    kv_bytes = 4 if name == "cpu" else dtype.itemsize
    ledger = plan_memory(model, config, device=name, element_bytes=dtype.itemsize, kv_element_bytes=kv_bytes,
                         max_seqs=max_seqs, max_batch_tokens=max_batch_tokens, available=available)
    pool_tokens = (ledger.num_pages - 1) * config.page_size
    context = min(config.context_length or model.context_length, pool_tokens)
    return Placement(device, dtype, Limits(max_seqs, max_batch_tokens, context), ledger)


def load_parts(path: Path, config: EngineConfig) -> Parts:
    """Open, place, load and warm up. Raises what each of those raises; nothing is left allocated then.

    In a thread that ends: a thread that ran a parallel torch op keeps OpenMP workers for as long as it lives, and with more of
    them than cores GNU OpenMP stops spinning at its barriers. The engine's thread shall be the only one that has any: beside
    another one, a decode step of SmolLM2 takes 40 ms on 2 cores instead of 28.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="load") as thread:
        parts = thread.submit(_load_parts, path, config).result()
    parts.grammars = Compiler(partial(_vocabulary, path, parts.model))
    return parts


def _vocabulary(path: Path, model: ModelConfig) -> Vocabulary:
    from model_core.grammar.matcher import Vocabulary
    from model_core.tokenizer.load import load_tokenizer

    return Vocabulary(load_tokenizer(path).byte_table(skip_special_tokens=True), model.vocab_size, model.eos_ids)


def _load_parts(path: Path, config: EngineConfig) -> Parts:
    startup = StartUp()
    startup.imports()
    if config.device != "cpu" and torch.cuda.is_available():
        with startup.timed("CUDA context"):
            head_start.begin()
            torch.cuda.mem_get_info()
    with startup.timed("open"):
        checkpoint = open_checkpoint(path)
        placed = place(checkpoint.config, config)
    _set_threads(config, placed.device)
    logger.info("memory: %s", placed.ledger)
    parameters = empty_parameters(checkpoint, dtype=placed.dtype, device=placed.device)
    targets = targets_of(checkpoint.config, parameters)
    if placed.device.type == "cpu":  # where weights are repacked, and nothing is idle meanwhile
        _read(checkpoint, targets, startup)
        return assemble(checkpoint.config, parameters, config, placed, startup)
    # A GPU's weights are read while kernels are loaded and launched on what is there of them: zeros, so that nothing that
    # was computed and stays (in the dump page) is not finite.
    for tensor in parameters.tensors():
        tensor.zero_()
    with ThreadPoolExecutor(1, thread_name_prefix="weights") as thread:
        reading = thread.submit(_read, checkpoint, targets, startup)
        return assemble(checkpoint.config, parameters, config, placed, startup, weights=reading.result)


def _read(checkpoint: Checkpoint, targets: dict[str, torch.Tensor], startup: StartUp) -> None:
    with startup.timed("weights") as step:
        fill(targets, checkpoint, Progress())
        step.note = f"{format_bytes(checkpoint.nbytes)}, {format_bytes(checkpoint.nbytes / step.so_far)}/s"


def assemble(model: ModelConfig, parameters: Parameters, config: EngineConfig, placed: Placement,
             startup: StartUp | None = None, *, weights: Callable[[], object] = int) -> Parts:  # fmt: skip
    """Everything that a model needs but its weights; benchmarks and tests come here with random ones.

    weights: returns when they are read; they need not be before. What it raises comes out.
    """
    startup = startup or StartUp()
    with startup.timed("model"):
        ops = Ops(placed.device, overrides=config.kernels, invariant=config.deterministic)
        llama = Llama(model, parameters, ops, placed.limits.max_context, invariant=config.deterministic)
    with startup.timed("KV pool"):
        kv = KVCache.empty(model, placed.ledger.num_pages, config.page_size, llama.dtype, placed.device)
        pool = PagePool(placed.ledger.num_pages, config.page_size, prefix_cache=config.prefix_cache)
    runner = _runner(llama, ops, kv, placed, config, startup, weights)
    if isinstance(runner, GraphRunner):
        with startup.timed("Triton's key"):
            head_start.wait()
        runner.warm_up(placed.limits.max_batch_tokens, startup.timed)
    else:
        with startup.timed("warm-up"):
            runner.warm_up(placed.limits.max_batch_tokens)
    with startup.timed("ready"):
        compiler.release()
        weights()
        scheduler = Scheduler(pool, placed.limits, eos_ids=model.eos_ids)
    for line in startup.lines():
        logger.info("  %s", line)
    logger.info("start-up: %s", ", ".join(f"{name} {seconds:.2f} s" for name, seconds in startup.seconds().items()))
    return Parts(model, placed.dtype, placed.device, placed.limits, placed.ledger, ops, runner, scheduler, startup)


def _runner(model: Llama, ops: Ops, kv: KVCache, placed: Placement, config: EngineConfig, startup: StartUp,
            weights: Callable[[], object]) -> StepRunner:  # fmt: skip
    """Captured graphs on a GPU, unless the configuration wants ops one by one or attention's reference."""
    captured = ops.captured() if config.cuda_graphs and placed.device.type == "cuda" else None
    if captured is None:
        return Runner(model, kv, placed.limits, config.page_size, placed.device)
    with startup.timed("step buffers"):
        runner = GraphRunner(model, captured, kv, placed.limits, config.page_size, placed.device, pdl=config.pdl,
                             capture_at_start=config.capture_at_start)  # fmt: skip
    if config.calibration != "off":
        with startup.timed("calibration"):
            try:
                runner.calibrate("again" if config.calibration == "again" else "auto", before=weights)
            except Exception:
                logger.exception("calibration failed: decode steps run the default kernels")
    return runner


def _set_threads(config: EngineConfig, device: torch.device) -> None:
    if config.threads:
        torch.set_num_threads(config.threads)
    elif device.type == "cpu":
        # Ray sets OMP_NUM_THREADS to an actor's num_cpus, which would leave the engine one core.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(cores)
