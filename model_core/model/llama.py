"""The forward pass of the Llama family: Llama 2 and 3, TinyLlama, SmolLM2, Mistral, Qwen2, Qwen3."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model_core.dispatch.ops import Ops
from model_core.kernels.linear import Linear
from model_core.model.batch import Batch
from model_core.model.config import ModelConfig
from model_core.model.kv import KVCache
from model_core.model.parameters import LayerParameters, Parameters
from model_core.model.rope import cos_sin_table
from model_core.threads import over_threads


@dataclass
class Layer:
    """One decoder layer, weights laid out as this device multiplies fastest; norms in the activations' dtype."""

    attn_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class Llama:
    """A model on one device.

    Takes the layers out of `parameters`, so that a weight kept in another layout (kernels/linear.py) frees its
    original at once. max_context: positions the rotary table covers. invariant: rows of a step do not influence each other's
    rounding, see Linear. `dtype` is the activations': the weights' own, or float32 where a CPU computes in it; a KVCache
    of that dtype is fastest, any other works.
    """

    def __init__(self, config: ModelConfig, parameters: Parameters, ops: Ops, max_context: int, *,
                 invariant: bool = False) -> None:
        assert len(parameters.layers) == config.num_layers, "these parameters were given to another Llama already"
        self.config, self.ops, self.max_context, self.invariant = config, ops, max_context, invariant
        self.scale = config.head_dim**-0.5
        self.embed = parameters.embed
        self.layers: list[Layer] = []
        waiting: list[LayerParameters | None] = [*parameters.layers]
        parameters.layers.clear()

        def place(index: int) -> Linear | Layer:
            if index < 0:
                return Linear(parameters.head, invariant=invariant, wide=True)
            layer, waiting[index] = waiting[index], None
            assert layer is not None
            return self._layer(layer)

        # The head (-1) first: it is the largest matrix, so the layers fill the other threads meanwhile.
        workers = None if self.embed.device.type == "cpu" else 1
        for placed in over_threads(place, range(-1, config.num_layers), workers):
            if isinstance(placed, Layer):
                self.layers.append(placed)
            else:
                self.head = placed
        self.dtype = self.head.dtype
        self.final_norm = parameters.final_norm.to(self.dtype)
        self.cos_sin = cos_sin_table(config, max_context, self.embed.device)

    def _linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
        return Linear(weight, bias, invariant=self.invariant)

    def _layer(self, layer: LayerParameters) -> Layer:
        qkv = self._linear(layer.qkv, layer.qkv_bias)
        q_norm, k_norm = (None if norm is None else norm.to(qkv.dtype) for norm in (layer.q_norm, layer.k_norm))
        return Layer(attn_norm=layer.attn_norm.to(qkv.dtype), qkv=qkv, q_norm=q_norm, k_norm=k_norm,
                     o=self._linear(layer.o), mlp_norm=layer.mlp_norm.to(qkv.dtype),
                     gate_up=self._linear(layer.gate_up), down=self._linear(layer.down))

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: KVCache) -> torch.Tensor:
        """Logits float32 [R, vocab] of rows `batch.logit_rows`; see `hidden_states`."""
        return self.logits(self.hidden_states(batch, kv))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits float32 [R, vocab] of final hidden states [R, hidden]."""
        if not len(hidden):
            return hidden.new_empty((0, self.config.vocab_size), dtype=torch.float32)
        return self.head(hidden).float()

    @torch.inference_mode()
    def hidden_states(self, batch: Batch, kv: KVCache, ops: Ops | None = None,
                      proceed: Callable[[], object] = int) -> torch.Tensor:  # fmt: skip
        """What the head multiplies, [R, hidden], of rows `batch.logit_rows`; keys and values of all T tokens go to `kv`.

        ops: other implementations than the model's own, for captured graphs. proceed: called before each layer; what it raises
        ends the pass."""
        config, ops, eps = self.config, ops or self.ops, self.config.rms_eps
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        residual = F.embedding(batch.token_ids, self.embed).to(self.dtype)
        x = ops.rmsnorm(residual, self.layers[0].attn_norm, eps)
        for index, layer in enumerate(self.layers):
            proceed()
            k_cache, v_cache = kv.layer(index)
            q, k, v = layer.qkv(x).view(-1, heads + 2 * kv_heads, dim).split((heads, kv_heads, kv_heads), dim=1)
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = ops.rmsnorm(q, layer.q_norm, eps), ops.rmsnorm(k, layer.k_norm, eps)
            ops.rope_kv_write(q, k, v, batch.positions, self.cos_sin, k_cache, v_cache, batch.slot_mapping)
            last = index + 1 == config.num_layers
            if last and not len(batch.logit_rows):  # only keys and values were wanted
                return residual.new_empty((0, config.hidden_size))
            attended = ops.paged_attention(q.to(k_cache.dtype), k_cache, v_cache, batch, scale=self.scale,
                                           sliding_window=config.sliding_window)
            if last:  # nobody reads the other rows any more
                attended, residual = attended.index_select(0, batch.logit_rows), residual.index_select(0, batch.logit_rows)
            x = self._add_and_norm(layer.o, attended.flatten(1).to(self.dtype), residual, layer.mlp_norm, ops)
            next_norm = self.final_norm if last else self.layers[index + 1].attn_norm
            x = self._add_and_norm(layer.down, ops.swiglu(layer.gate_up(x)), residual, next_norm, ops)
        return x

    def _add_and_norm(self, linear: Linear, x: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor,
                      ops: Ops) -> torch.Tensor:  # fmt: skip
        """residual += linear(x), in place; the norm of it."""
        if linear.accumulates:
            linear.add_to(residual, x)
            return ops.rmsnorm(residual, norm, self.config.rms_eps)
        return ops.add_rmsnorm(linear(x), residual, norm, self.config.rms_eps)

    @property
    def nbytes(self) -> int:
        """Bytes of weights, packed copies included, and of the rotary table."""
        tensors = [self.final_norm, self.cos_sin]
        tensors += [norm for layer in self.layers for norm in (layer.attn_norm, layer.mlp_norm, layer.q_norm, layer.k_norm)
                    if norm is not None]
        if self.head.weight is None or self.head.weight.data_ptr() != self.embed.data_ptr():
            tensors.append(self.embed)
        return sum(linear.nbytes for linear in self._linears()) + sum(t.numel() * t.element_size() for t in tensors)

    @property
    def nbytes_per_step(self) -> int:
        """Bytes of weights that a decode step reads: every linear as it multiplies fastest; one row of the embedding is
        nothing beside them."""
        return sum(linear.nbytes_read for linear in self._linears())

    def _linears(self) -> list[Linear]:
        return [self.head] + [one for layer in self.layers for one in (layer.qkv, layer.o, layer.gate_up, layer.down)]
