"""A decode step as a chain of kernels: one token for each of M slots, all state on the device, no host in between."""

from __future__ import annotations

import torch

from model_core.dispatch.tiles import PRODUCTS, StepTiles, product_shape
from model_core.kernels.decode.attention import SplitSpace, SplitTiles, attention
from model_core.kernels.decode.embed import embed
from model_core.kernels.decode.gate_up import gate_up, gate_up_library, gate_up_tiles
from model_core.kernels.decode.head import head, head_library, head_tiles
from model_core.kernels.decode.products import chains_launches
from model_core.kernels.decode.project import project, project_library, project_tiles
from model_core.kernels.decode.qkv import qkv, qkv_library, qkv_tiles
from model_core.kernels.decode.registers import RegisterTiles
from model_core.kernels.decode.restrict import restrict
from model_core.kernels.decode.sample import SampleSpace, sample
from model_core.kernels.decode.state import DecodeState
from model_core.kernels.decode.streaming import StreamTiles
from model_core.kernels.decode.tiles import Stream, TensorTiles, TileSpace
from model_core.kernels.linear import Linear
from model_core.model.config import ModelConfig
from model_core.model.kv import KVCache
from model_core.model.llama import Llama

TILES = TensorTiles | RegisterTiles | StreamTiles


class DecodeChain:
    """Five products or attentions a layer, then head and sampler; see model_core/kernels/decode. Buffers are allocated
    once, for steps of at most `rows` slots.

    pdl: chain launches (programmatic dependent launch, Hopper): a kernel's start overlaps the end of the one before.
    """

    def __init__(self, model: Llama, kv: KVCache, state: DecodeState, rows: int, *,
                 pdl: bool | None = None) -> None:
        config, device = model.config, model.embed.device
        assert (reason := why_unsupported(config, model.dtype)) is None, reason
        self.model, self.kv, self.state = model, kv, state
        self.pdl = chains_launches(device) if pdl is None else pdl

        def buffer(*shape: int, dtype: torch.dtype = model.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.stream = Stream(rows, config.hidden_size, model.dtype, device)
        self.q = buffer(rows, config.num_heads, config.head_dim)
        self.attended = buffer(rows, config.q_size)
        self.inner = buffer(rows, config.intermediate_size)
        self.product = buffer(rows * max(config.q_size + 2 * config.kv_size, 2 * config.intermediate_size))
        self.logits = buffer(rows, config.vocab_size, dtype=torch.float32)
        self.splits = SplitSpace.empty(rows, config.num_heads, config.num_kv_heads, config.head_dim, device)
        self.samples = SampleSpace(rows, device)
        self.space = TileSpace(0, 0, device)

    def reserve(self, rows: int, tiles: StepTiles) -> None:
        """Make room for the parts of split products. Before anything is captured: a graph keeps the buffer's address."""
        floats, counters = self.space.part.numel(), self.space.arrived.numel()
        for op in PRODUCTS:
            choice = getattr(tiles, op)
            if isinstance(choice, TensorTiles | StreamTiles):
                size, _ = product_shape(self.model.config, op)
                pair = op == "gate_up" or (op == "qkv" and isinstance(choice, TensorTiles))
                need = TileSpace.needs(2 * size if op == "qkv" and not pair else size, rows, choice, pair=pair)
                floats, counters = max(floats, need[0]), max(counters, need[1])
        if (floats, counters) != (self.space.part.numel(), self.space.arrived.numel()):
            self.space = TileSpace(floats, counters, self.space.part.device)

    def launch(self, rows: torch.Tensor, tiles: StepTiles, *, longest: int, layers: int | None = None,
               ruled: bool = True) -> None:  # fmt: skip
        """Compute the last tokens of slots `rows` (int64 [M]) and sample the next.

        longest: bound of every slot's context. layers: only the first ones, for calibration. ruled: whether a slot has rules
        that are not HELD; without, a kernel less. Afterwards `logits` [:M] holds what was sampled from.
        """
        count = rows.shape[0]
        (self._in_rows if tiles.in_rows else self._in_stream)(rows, tiles, longest, layers)
        if ruled:
            restrict(self.logits[:count], rows, self.state, self.samples, pdl=self.pdl)
        sample(self.logits[:count], rows, self.state, self.samples, pdl=self.pdl, ruled=ruled)

    def _attend(self, layer: int, rows: torch.Tensor, tiles: SplitTiles, longest: int) -> torch.Tensor:
        count, config = rows.shape[0], self.model.config
        k_cache, v_cache = self.kv.layer(layer)
        out = self.attended[:count]
        attention(self.q[:count], k_cache, v_cache, out.view(count, config.num_heads, -1), rows, self.state, self.splits,
                  scale=self.model.scale, window=config.sliding_window, longest=longest, tiles=tiles,
                  pdl=self.pdl)  # fmt: skip
        return out

    def _in_rows(self, rows: torch.Tensor, tiles: StepTiles, longest: int, layers: int | None) -> None:
        model, state, pdl, eps, m = self.model, self.state, self.pdl, self.model.config.rms_eps, rows.shape[0]
        residual, inner, q = self.stream.residual[:m], self.inner[:m], self.q[:m]
        t = {op: getattr(tiles, op) for op in PRODUCTS}
        for index, layer in enumerate(model.layers[:layers]):
            first = index == 0
            source = model.embed if first else residual
            qkv(source, layer.attn_norm, _weight(layer.qkv), layer.qkv.bias, model.cos_sin, rows, state,
                *self.kv.layer(index), q, eps=eps, tiles=t["qkv"], embed=first, pdl=pdl)  # fmt: skip
            attended = self._attend(index, rows, tiles.attention_to(longest), longest)
            project(attended, _weight(layer.o), source, residual, rows, state.last_token, tiles=t["o"], embed=first, pdl=pdl)
            gate_up(residual, layer.mlp_norm, _weight(layer.gate_up), inner, eps=eps, tiles=t["gate_up"], pdl=pdl)
            project(inner, _weight(layer.down), residual, residual, rows, state.last_token, tiles=t["down"], embed=False,
                    pdl=pdl)  # fmt: skip
        head(residual, model.final_norm, _weight(model.head), self.logits[:m], eps=eps, tiles=t["head"], pdl=pdl)

    def _in_stream(self, rows: torch.Tensor, tiles: StepTiles, longest: int, layers: int | None) -> None:
        model, m = self.model, rows.shape[0]
        norms = [layer.attn_norm for layer in model.layers[1:]] + [model.final_norm]
        embed(model.embed, model.layers[0].attn_norm, rows, self.state.last_token, self.stream, pdl=self.pdl)
        for index, layer in enumerate(model.layers[:layers]):
            self._qkv(index, rows, tiles.qkv)
            attended = self._attend(index, rows, tiles.attention_to(longest), longest)
            self._project(attended, layer.o, layer.mlp_norm, tiles.o)
            self._gate_up(index, m, tiles.gate_up)
            self._project(self.inner[:m], layer.down, norms[index], tiles.down)
        self._head(m, tiles.head)

    def _qkv(self, index: int, rows: torch.Tensor, choice: object) -> None:
        model, layer, m, config = self.model, self.model.layers[index], rows.shape[0], self.model.config
        weight, caches, q = _weight(layer.qkv), self.kv.layer(index), self.q[:m]
        common = (weight, layer.qkv.bias, model.cos_sin, rows, self.state, *caches)
        if isinstance(choice, TILES):
            qkv_tiles(self.stream, *common, q, eps=config.rms_eps, tiles=choice, pdl=self.pdl, space=self.space)
        else:
            qkv_library(self.stream, *common, self._product(m, len(weight)), q, eps=config.rms_eps, pdl=self.pdl)

    def _project(self, x: torch.Tensor, linear: Linear, gain: torch.Tensor, choice: object) -> None:
        weight = _weight(linear)
        if isinstance(choice, TILES):
            project_tiles(x, weight, gain, self.stream, tiles=choice, pdl=self.pdl, space=self.space)
        else:
            project_library(x, weight, gain, self.stream, self._product(x.shape[0], len(weight)), pdl=self.pdl)

    def _gate_up(self, index: int, m: int, choice: object) -> None:
        weight, eps, out = _weight(self.model.layers[index].gate_up), self.model.config.rms_eps, self.inner[:m]
        if isinstance(choice, TILES):
            gate_up_tiles(self.stream, weight, out, eps=eps, tiles=choice, pdl=self.pdl, space=self.space)
        else:
            gate_up_library(self.stream, weight, self._product(m, len(weight)), out, eps=eps, pdl=self.pdl)

    def _head(self, m: int, choice: object) -> None:
        weight, eps, logits = _weight(self.model.head), self.model.config.rms_eps, self.logits[:m]
        if isinstance(choice, TILES):
            head_tiles(self.stream, weight, logits, eps=eps, tiles=choice, pdl=self.pdl)
        else:
            head_library(self.stream, weight, self._product(m, weight.shape[1]), logits, eps=eps, pdl=self.pdl)

    def _product(self, rows: int, width: int) -> torch.Tensor:
        return self.product[: rows * width].view(rows, width)


def why_unsupported(config: ModelConfig, dtype: torch.dtype) -> str | None:
    """None if the fused kernels compute this model, else the reason in words."""
    if config.qk_norm:
        return "norms of query and key heads (Qwen3) are not fused"
    if dtype == torch.float16:
        return "float16 cannot hold the residual stream before it is normalised"
    if config.hidden_size % 16 or config.vocab_size % 2 or config.head_dim % 16:
        return "hidden size and head size must be multiples of 16, the vocabulary's even"
    return None


def _weight(linear: Linear) -> torch.Tensor:
    assert linear.weight is not None, "packed weights are for CPUs"
    return linear.weight


