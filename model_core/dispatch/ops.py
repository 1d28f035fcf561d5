"""The ops of the forward pass, each choosing its implementation per call from the shape alone."""

from __future__ import annotations

import difflib
from typing import Any

import torch

from model_core.dispatch.table import IMPLEMENTATIONS, OPS, Table, by_threshold, only
from model_core.errors import ConfigError
from model_core.kernels import paged_attention as attention
from model_core.kernels import rmsnorm, rope_kv, runtime, swiglu
from model_core.kernels.paged_attention_torch import paged_attention_torch
from model_core.model.batch import Batch


class Ops:
    """One per engine. Methods are what the forward pass calls; shapes and dtypes are those of the kernel files.

    overrides: {op or "default": "torch" | "triton" | "auto"}; an op's own entry goes before "default". "auto" is the rule
    of dispatch/table.py with `threshold`. invariant: a token's bits do not depend on the others of its batch. Raises
    ConfigError for unknown names, for "triton" where it cannot run, and for what cannot be invariant.
    """

    def __init__(
        self, device: torch.device | str, *, overrides: dict[str, str] | None = None, threshold: int = 128,
        invariant: bool = False,
    ) -> None:  # fmt: skip
        if threshold < 0:
            raise ConfigError(f"dispatch threshold must be >= 0 tokens, got {threshold}")
        self.device = torch.device(device)
        self.threshold, self.invariant = threshold, invariant
        self.overrides = overrides = dict(overrides or {})
        for op, choice in overrides.items():
            _check_name("op", op, (*OPS, "default"))
            _check_name(f"implementation for {op}", choice, (*IMPLEMENTATIONS, "auto"))
        self.tables: dict[str, Table] = {
            op: self._table(op, op if op in overrides else "default", overrides.get(op, overrides.get("default", "auto")))
            for op in OPS
        }
        # Bound once: decode calls these 150 times a step.
        self._rmsnorm, self._add_rmsnorm = self.tables["rmsnorm"].choose, self.tables["add_rmsnorm"].choose
        self._rope_kv_write, self._swiglu = self.tables["rope_kv_write"].choose, self.tables["swiglu"].choose
        self._paged_attention = self.tables["paged_attention"].choose

    def _table(self, op: str, key: str, wanted: str) -> Table:
        problem = runtime.why_unusable(self.device)
        if wanted == "triton" and problem:
            raise ConfigError(f"kernels.{key}: triton cannot run here ({problem}); use torch or auto")
        if self.invariant and self.device.type != "cpu":
            # torch divides reductions by the number of rows, and two implementations never round alike
            problem = problem or _too_old(self.device)
            if problem:
                raise ConfigError(f"deterministic: true needs Triton on a GPU ({problem}); set device: cpu or leave it off")
            if wanted == "torch":
                raise ConfigError(f"deterministic: true runs Triton's kernels on a GPU; remove torch from kernels.{key}")
            return only("triton", "deterministic: one implementation for any number of tokens")
        if wanted != "auto":
            return only(wanted, f"override {key}: {wanted}")
        if problem or self.device.type == "cpu":  # the interpreter is for tests: asked for by override only
            return only("torch", problem or "the device is a CPU")
        if op == "paged_attention" and (problem := _too_old(self.device)):
            return only("torch", problem)
        return by_threshold(op, self.threshold)

    def captured(self) -> Ops | None:
        """The choices inside captured graphs: Triton unless overridden, for a launch costs no host time there and one fused
        kernel moves fewer bytes than several. None if attention's reference is asked for: it looks at the batch on the host."""
        wanted = {"default": "triton", **{op: choice for op, choice in self.overrides.items() if choice != "auto"}}
        if wanted.get("paged_attention", wanted["default"]) == "torch" or runtime.why_unusable(self.device):
            return None
        if self.tables["paged_attention"].choose(1 << 40) == "torch":
            return None
        return Ops(self.device, overrides=wanted, invariant=self.invariant)

    def rmsnorm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x [..., H] (a [T, heads, D] view for per-head norms) -> same shape."""
        if self._rmsnorm(x.shape[0]) == "triton":
            return rmsnorm.rmsnorm(x, weight, eps)
        return rmsnorm.rmsnorm_torch(x, weight, eps)

    def add_rmsnorm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """residual [T, H] += x in place; returns rmsnorm(residual)."""
        if self._add_rmsnorm(x.shape[0]) == "triton":
            return rmsnorm.add_rmsnorm(x, residual, weight, eps)
        return rmsnorm.add_rmsnorm_torch(x, residual, weight, eps)

    def rope_kv_write(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor,
        k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor,
    ) -> None:  # fmt: skip
        """Rotate q [T, Hq, D] in place, write rotated k and v [T, Hkv, D] to the cache; see kernels/rope_kv.py."""
        triton = self._rope_kv_write(q.shape[0]) == "triton"
        write = rope_kv.rope_kv_write if triton else rope_kv.rope_kv_write_torch
        write(q, k, v, positions, cos_sin, k_cache, v_cache, slot_mapping)

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up [T, 2 * I] -> silu(gate) * up, [T, I]."""
        if self._swiglu(gate_up.shape[0]) == "triton":
            return swiglu.swiglu(gate_up)
        return swiglu.swiglu_torch(gate_up, by_row=self.invariant)

    def paged_attention(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: Batch,
        *, scale: float, sliding_window: int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """q [T, Hq, D] over the batch's pages -> [T, Hq, D]; see kernels/paged_attention.py."""
        if self._paged_attention(sum(batch.context_lens)) == "triton":
            return attention.paged_attention(q, k_cache, v_cache, batch, scale=scale, sliding_window=sliding_window)
        return paged_attention_torch(q, k_cache, v_cache, batch, scale=scale, sliding_window=sliding_window,
                                     by_token=self.invariant)  # fmt: skip

    def explain(self) -> list[dict[str, Any]]:
        """The tables, one row per op and bucket; JSON-serialisable."""
        rows = []
        for op, table in self.tables.items():
            above = None
            for bucket in table.buckets:
                unit = "key/value tokens" if op == "paged_attention" else "tokens"
                bounds = [f"> {above}"] * (above is not None) + [f"<= {bucket.upto}"] * (bucket.upto is not None)
                rows.append({
                    "op": op,
                    "rule": f"{unit} {' and '.join(bounds)}" if bounds else f"any number of {unit}",
                    "candidates": bucket.microseconds or dict.fromkeys(IMPLEMENTATIONS),
                    "choice": bucket.choice,
                    "reason": bucket.reason,
                })
                above = bucket.upto
        return rows


def _too_old(device: torch.device) -> str | None:
    """Why attention's kernel does not run on this GPU: triton 3.6 turns tl.dot into scalar multiplications there."""
    old = torch.cuda.get_device_capability(device) < (8, 0)
    return "no tensor-core tl.dot below compute capability 8.0" if old else None


def _check_name(what: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"kernels: unknown {what} {name!r}{hint} (one of: {', '.join(known)})")
