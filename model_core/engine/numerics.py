"""What decides about the last bits of an engine's numbers, as a digest: two engines that say the same compute the same."""

from __future__ import annotations

import hashlib
import json

import torch

from model_core.engine.config import EngineConfig
from model_core.engine.load import Parts

# of EngineConfig: what else is in it decides about memory, or when things are compiled
_SETTINGS = ("page_size", "prefix_cache", "kernels", "cuda_graphs", "deterministic", "threads")


def numerics_of(parts: Parts, config: EngineConfig, weights: str) -> str:
    """weights: a digest of them."""
    device = torch.cuda.get_device_name(parts.device) if parts.device.type == "cuda" else parts.device.type
    told = {
        "weights": weights, "dtype": str(parts.dtype), "device": device, "torch": torch.__version__,
        "limits": [parts.limits.max_seqs, parts.limits.max_batch_tokens],  # how prompts are divided, batches rounded up
        "kernels": [[row["op"], row["rule"], row["choice"]] for row in parts.runner.explain()],
        **{name: getattr(config, name) for name in _SETTINGS},
    }  # fmt: skip
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
