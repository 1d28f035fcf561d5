"""A decode step as a chain of fused kernels: one token for each of M slots, all state on the device, no host in between."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model_core.kernels.decode.attention import SplitSpace, SplitTiles, attention
from model_core.kernels.decode.gate_up import gate_up
from model_core.kernels.decode.head import head
from model_core.kernels.decode.products import RowTiles
from model_core.kernels.decode.project import project
from model_core.kernels.decode.qkv import qkv
from model_core.kernels.decode.sample import SampleSpace, sample
from model_core.kernels.decode.state import DecodeState
from model_core.kernels.runtime import cdiv
from model_core.model.kv import KVCache
from model_core.model.llama import Llama


@dataclass(frozen=True)
class ChainTiles:
    """Launch shapes of the chain's kernels."""

    qkv: RowTiles
    o: RowTiles
    gate_up: RowTiles
    down: RowTiles
    head: RowTiles
    attention: SplitTiles


class DecodeChain:
    """Five kernels a layer, then head and sampler; see model_core/kernels/decode. Buffers are allocated once.

    rows: the most slots of one step.
    """

    def __init__(self, model: Llama, kv: KVCache, state: DecodeState, rows: int, tiles: ChainTiles, *, pdl: bool) -> None:
        config, device = model.config, model.embed.device
        self.model, self.kv, self.state, self.tiles, self.pdl = model, kv, state, tiles, pdl

        def buffer(*shape: int, dtype: torch.dtype = model.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.residual = buffer(rows, config.hidden_size)
        self.q = buffer(rows, config.num_heads, config.head_dim)
        self.attended = buffer(rows, config.num_heads, config.head_dim)
        self.inner = buffer(rows, config.intermediate_size)
        self.logits = buffer(rows, config.vocab_size, dtype=torch.float32)
        self.splits = SplitSpace.empty(rows, config.num_heads, config.num_kv_heads, config.head_dim,
                                       cdiv(model.max_context, tiles.attention.split), device)  # fmt: skip
        self.samples = SampleSpace(rows, device)

    def launch(self, rows: torch.Tensor, out: torch.Tensor, *, longest: int, noise: bool) -> None:
        """Compute the last tokens of slots `rows` (int64 [M]) and sample the next into `out` (int64 [M]).

        longest: bound of every slot's context. noise: some slot has a temperature.
        """
        model, config, state, tiles, pdl = self.model, self.model.config, self.state, self.tiles, self.pdl
        m, eps = rows.shape[0], config.rms_eps
        residual, q, attended, inner = self.residual[:m], self.q[:m], self.attended[:m], self.inner[:m]
        for index, layer in enumerate(model.layers):
            k_cache, v_cache = self.kv.layer(index)
            first = index == 0
            stream = model.embed if first else residual
            qkv(stream, layer.attn_norm, _weight(layer.qkv), layer.qkv.bias, model.cos_sin, rows, state, k_cache, v_cache, q,
                eps=eps, tiles=tiles.qkv, embed=first, pdl=pdl)  # fmt: skip
            attention(q, k_cache, v_cache, attended, rows, state, self.splits, scale=model.scale,
                      window=config.sliding_window, longest=longest, tiles=tiles.attention, pdl=pdl)  # fmt: skip
            project(attended.view(m, -1), _weight(layer.o), stream, residual, rows, state.last_token, tiles=tiles.o,
                    embed=first, pdl=pdl)  # fmt: skip
            gate_up(residual, layer.mlp_norm, _weight(layer.gate_up), inner, eps=eps, tiles=tiles.gate_up, pdl=pdl)
            project(inner, _weight(layer.down), residual, residual, rows, state.last_token, tiles=tiles.down, embed=False,
                    pdl=pdl)  # fmt: skip
        head(residual, model.final_norm, _weight(model.head), self.logits[:m], eps=eps, tiles=tiles.head, pdl=pdl)
        sample(self.logits[:m], rows, state, out, self.samples, noise=noise, pdl=pdl)


def _weight(linear) -> torch.Tensor:  # type: ignore[no-untyped-def]
    assert linear.weight is not None, "packed weights are for CPUs"
    return linear.weight
