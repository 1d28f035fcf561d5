"""The memory ledger: every byte the engine will hold, predicted before it is allocated."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from model_core.engine.config import EngineConfig
from model_core.engine.validate import MAX_LOGIT_BIAS
from model_core.errors import OutOfMemory
from model_core.kernels.decode.attention import MAX_SPLITS
from model_core.kernels.decode.sample import SAMPLE_BYTES
from model_core.kernels.decode.state import RULES
from model_core.model.config import ModelConfig

GIB = 1 << 30
_FEWEST_PAGES = 3  # the dump page, one to compute on and one to grow into
_LOGIT_BYTES = 53  # per logit of a step that samples: 40 at peak, 48 with log-probabilities (52 in Python 3.10)
_CUDA_CONTEXT = 600 << 20  # driver context, cuBLAS workspaces and loaded kernels: 480 to 560 MiB seen on an H100


@dataclass(frozen=True)
class Ledger:
    """Bytes by purpose. `available` is what this engine may use; pages fill what the rest leaves of it."""

    available: int
    weights: int
    activations: int
    logits: int
    sampler: int
    runtime: int
    page_bytes: int
    num_pages: int

    @property
    def pages(self) -> int:
        return self.page_bytes * self.num_pages

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.logits + self.sampler + self.runtime + self.pages

    def rows(self) -> list[tuple[str, int]]:
        """(purpose, bytes) in the order a person reads them."""
        return [("weights", self.weights), ("KV pages", self.pages), ("activations (peak)", self.activations),
                ("logits (peak)", self.logits), ("sampler state", self.sampler), ("runtime", self.runtime),
                ("total", self.total), ("available", self.available)]

    def __str__(self) -> str:
        return ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in self.rows())


def available_host_memory() -> int:
    """Bytes this process may still take: MemAvailable, bounded by the control group's limit if there is one."""
    free = GIB
    for line in Path("/proc/meminfo").read_text().splitlines() if os.path.exists("/proc/meminfo") else ():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return max(0, free)


def plan_memory(model: ModelConfig, engine: EngineConfig, *, device: str, element_bytes: int, kv_element_bytes: int,
                max_seqs: int, max_batch_tokens: int, available: int) -> Ledger:
    """Divide `available` bytes. Raises OutOfMemory, with the ledger and the number to set, if no sequence would fit.

    Peaks are those of the widest step: `max_batch_tokens` rows through a layer, `max_seqs` rows of logits with all that
    choosing from them takes, or prompt log-probabilities in their place.
    """
    longest = engine.context_length or model.context_length
    rotary = longest * model.head_dim * 4
    weights = _weight_bytes(model, device, element_bytes, engine.deterministic) + rotary
    row = 4 * model.hidden_size + 2 * (model.q_size + 2 * model.kv_size) + 3 * model.intermediate_size
    activations = max_batch_tokens * row * max(element_bytes, 4)
    logits = max_seqs * model.vocab_size * _LOGIT_BYTES
    sampler = max_seqs * (model.vocab_size * 4 + MAX_LOGIT_BIAS * 12) + 256 * 8  # at last the bits of bytes, for masks
    if device == "cuda":
        activations += _step_buffers(model, max_seqs, element_bytes)
    runtime = _CUDA_CONTEXT if device == "cuda" else 256 << 20
    fixed = weights + activations + logits + sampler + runtime
    page_bytes = model.kv_bytes_per_token(kv_element_bytes) * engine.page_size

    wanted = engine.kv_cache_bytes
    if wanted is None:
        wanted = available - fixed
        if device == "cpu":
            wanted = min(wanted, available // 4, 2 * GIB)
    # No sequence can be longer than the context, so more pages than max_seqs full contexts (plus the dump page and
    # one page of slack each) would never be used.
    useful = max_seqs * (-(-longest // engine.page_size) + 1) + 1
    ledger = Ledger(available, weights, activations, logits, sampler, runtime, page_bytes,
                    max(0, min(wanted // page_bytes, useful)))
    if ledger.total > available or ledger.num_pages < _FEWEST_PAGES:
        room, least = available - fixed, _FEWEST_PAGES * page_bytes
        short = max(ledger.total - available, least - max(0, wanted))
        pool = f"Set kv_cache_bytes to at most {room} and at least {least} (now {engine.kv_cache_bytes}), or " * (room >= least)
        advice = (f"{pool}lower max_batch_tokens (now {max_batch_tokens}) or max_seqs (now {max_seqs}), use a smaller dtype or "
                  f"model, or {'raise gpu_memory_fraction' if device == 'cuda' else 'free memory'}.")
        raise OutOfMemory(f"The model does not fit: {ledger}; {short / GIB:.2f} GiB short. {advice[0].upper()}{advice[1:]}")
    return ledger


def _step_buffers(model: ModelConfig, max_seqs: int, element_bytes: int) -> int:
    """Fixed buffers of captured steps (model/decode.py, engine/graphs.py, engine/late.py): a row's vectors, its attention
    splits, logits of decodes and of prompts, what is gathered of these, and masks."""
    qkv, inner = model.q_size + 2 * model.kv_size, model.intermediate_size
    vectors = 2 * model.hidden_size + 2 * model.q_size + inner + max(qkv, 2 * inner)
    splits = MAX_SPLITS * model.num_heads * (model.head_dim + 2) * 4
    sampled = model.vocab_size * 4 + RULES * 4 + SAMPLE_BYTES
    masks = max_seqs * -(-model.vocab_size // 32) * 4
    return max_seqs * (vectors * element_bytes + splits) + 2 * max_seqs * sampled + masks + (64 << 20)


def _weight_bytes(model: ModelConfig, device: str, element_bytes: int, deterministic: bool) -> int:
    """On the CPU (kernels/linear.py) float32 matrices are kept packed for decoding beside the original for prefill; 16-bit
    ones, and those that are multiplied deterministically, only packed, so that a tied head is a copy of the embedding."""
    embedding = model.vocab_size * model.hidden_size
    copied = 0
    if device == "cpu" and element_bytes == 4 and not deterministic:
        copied = model.num_parameters - (0 if model.tie_embeddings else embedding)
    elif device == "cpu" and model.tie_embeddings:
        copied = embedding
    return (model.num_parameters + copied) * element_bytes
