"""How each product of a decode step is computed for a number of rows: by which kernel, with which tiles; how attention divides
contexts; and how much shared memory all of them prefer (kernels/decode/partition.py).

One row: every kernel streams its weights through registers ("rows"). Up to 16: weights in registers, tensor cores. Beyond, on
Hopper: weights through shared memory by TMA; elsewhere tiles of the compiler's own pipeline. Where it is faster: cuBLAS with a
small kernel behind it. A kernel's time depends on its neighbours (a tile that is fastest alone can cost Llama-2-7B a third of
a step), so the first candidates below are what made whole steps fastest on an H100, one choice after the other
(2026-11-27, context 257, microseconds of a step of 8 layers of TinyLlama, of 4 of the others):

    rows                          1      8     16     32     64    128    256
    TinyLlama-1.1B              342    370    397    428    527    645    858
      driver's shared memory    362    466    412    434    556    658    863
    Llama-2-7B                  648    723    783    897  1,107  1,556  2,451
    Llama-3-8B                  950  1,011  1,036  1,075  1,180  1,386  1,855

`mini-llm dispatch MODEL --all` shows what was measured here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from model_core.kernels.decode.attention import SplitTiles
from model_core.kernels.decode.partition import DRIVERS_CHOICE
from model_core.kernels.decode.products import RowTiles
from model_core.kernels.decode.registers import RegisterTiles
from model_core.kernels.decode.streaming import StreamTiles
from model_core.kernels.decode.tiles import TensorTiles
from model_core.model.config import ModelConfig

Library = Literal["library"]
Choice = RowTiles | RegisterTiles | StreamTiles | TensorTiles | Library
PRODUCTS = ("qkv", "o", "gate_up", "down", "head")
MOST_ROWS = 1  # that the plain row kernels take: with two the tensor cores are as fast
MOST_IN_REGISTERS = 16
MOST_IN_SHARED = 64
NEAR = 512  # keys of the longest context of a step, up to which its attention is `attention`, beyond `far`


@dataclass(frozen=True)
class StepTiles:
    """One choice per product, for steps of one bucket of rows: RowTiles for all, or for none. shared: percent of a
    multiprocessor's memory that the step's kernels prefer as shared memory, -1 is the driver's choice for each."""

    qkv: Choice
    o: Choice
    gate_up: Choice
    down: Choice
    head: Choice
    attention: SplitTiles
    shared: int = DRIVERS_CHOICE
    far: SplitTiles | None = None  # None: as near

    def attention_to(self, longest: int) -> SplitTiles:
        """How a step divides contexts of at most `longest` keys."""
        return self.attention if longest <= NEAR or self.far is None else self.far

    def __post_init__(self) -> None:
        assert len({isinstance(getattr(self, op), RowTiles) for op in PRODUCTS}) == 1, self

    @property
    def in_rows(self) -> bool:
        return isinstance(self.qkv, RowTiles)


def product_shape(config: ModelConfig, op: str) -> tuple[int, int]:
    """(rows of W that tiles divide, columns of W): pairs of rows for qkv, rows of one half for gate_up."""
    hidden, inner = config.hidden_size, config.intermediate_size
    return {
        "qkv": ((config.q_size + 2 * config.kv_size) // 2, hidden), "o": (hidden, config.q_size), "gate_up": (inner, hidden),
        "down": (hidden, inner), "head": (config.vocab_size, hidden),
    }[op]  # fmt: skip


def fits(config: ModelConfig, op: str, choice: Choice) -> bool:
    """Whether a kernel's tiles divide this model's shapes."""
    if choice == "library":
        return True
    assert not isinstance(choice, str)
    rows, width = product_shape(config, op)
    each = choice.rows
    if isinstance(choice, StreamTiles):
        if op == "qkv":
            return each == config.head_dim and each % 64 == 0 and choice.divides(width)
        if each % 64 and op != "gate_up":
            return False
    elif op in ("qkv", "gate_up") and not isinstance(choice, TensorTiles):
        each //= 2  # they count both rows of a pair
    if each < 1 or rows % each or (op == "qkv" and config.head_dim // 2 % each):
        return False
    if isinstance(choice, RegisterTiles | StreamTiles) and not choice.divides(width):
        return False
    return not (op == "head" and isinstance(choice, TensorTiles | StreamTiles) and choice.splits > 1)


def has_wgmma() -> bool:
    """Whether the GPU has the instructions of kernels/decode/streaming.py (Hopper's, which its successors have not)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def candidates(config: ModelConfig, op: str, rows: int, dtype: torch.dtype) -> list[Choice]:
    """What may compute a product for `rows` rows, the likeliest first; the last always fits. float32 has no tensor cores here
    (tf32 would be less): beyond one row it is cuBLAS's."""
    wide = config.hidden_size >= 4096
    if rows <= MOST_ROWS:
        smallest = RowTiles(2 if op in ("qkv", "gate_up") else 1, 1024, 4)
        return [choice for choice in _in_rows(op, wide) if fits(config, op, choice)] + [smallest]
    if dtype == torch.float32:
        return ["library"]
    found: list[Choice] = []
    if rows <= MOST_IN_REGISTERS:
        found += _in_registers(op, rows, wide)
    if has_wgmma() and rows <= 128:
        found = _with_streams(found, op, rows, wide)
    elif rows <= MOST_IN_SHARED and op in ("o", "down", "head"):
        found += _in_shared(op, rows, wide)
    return [choice for choice in dict.fromkeys([*found, "library"]) if fits(config, op, choice)]


def _in_rows(op: str, wide: bool) -> list[Choice]:
    chosen: dict[str, list[Choice]]
    if wide:
        chosen = {
            "qkv": [RowTiles(2, 2048, 8), RowTiles(4, 2048, 8), RowTiles(4, 1024, 2)],
            "o": [RowTiles(2, 2048, 4), RowTiles(4, 2048, 8), RowTiles(8, 2048, 4)],
            "gate_up": [RowTiles(2, 1024, 8), RowTiles(2, 2048, 4), RowTiles(2, 1024, 4)],
            "down": [RowTiles(2, 2048, 4), RowTiles(4, 1024, 4), RowTiles(2, 1024, 4)],
            "head": [RowTiles(1, 4096, 8), RowTiles(1, 2048, 4), RowTiles(2, 2048, 8)],
        }
        return chosen[op]
    chosen = {
        "qkv": [RowTiles(8, 2048, 2), RowTiles(4, 2048, 8), RowTiles(4, 1024, 2)],
        "o": [RowTiles(8, 2048, 4), RowTiles(4, 2048, 8), RowTiles(2, 2048, 4), RowTiles(4, 512, 8)],
        "gate_up": [RowTiles(8, 2048, 8), RowTiles(2, 1024, 4), RowTiles(2, 2048, 4)],
        "down": [RowTiles(2, 2048, 8), RowTiles(4, 1024, 4), RowTiles(2, 1024, 4)],
        "head": [RowTiles(2, 2048, 8), RowTiles(1, 2048, 4), RowTiles(1, 1024, 2)],
    }
    return chosen[op]


def _in_registers(op: str, rows: int, wide: bool) -> list[Choice]:
    likeliest = {
        "qkv": [RegisterTiles(32, 64, 4, 4)] * wide + [RegisterTiles(16, 64, 8, 4)],
        "o": [RegisterTiles(16, 256, 2, 4), RegisterTiles(16, 128, 4, 4)],
        "gate_up": [RegisterTiles(16, 128, 4, 2 if wide else 4)] * (rows <= 8) + [RegisterTiles(32, 128, 1, 4)],
        "down": [RegisterTiles(16, 64, 8, 4)] * wide + [RegisterTiles(16, 128, 4, 4), RegisterTiles(16, 64, 8, 4)],
        "head": [RegisterTiles(16, 64, 8, 4 if rows <= 8 else 2), RegisterTiles(16, 128, 4, 2)],
    }[op]  # fmt: skip
    return [*likeliest, *(RegisterTiles(16, chunk, depth, 4) for chunk in (64, 32) for depth in (4, 2, 1))]


def _with_streams(found: list[Choice], op: str, rows: int, wide: bool) -> list[Choice]:
    """`found` and the stream tiles, in the order of what whole steps preferred."""
    s, chosen = StreamTiles, dict[str, list[Choice]]()
    if rows <= 16 and wide:
        chosen = {
            "qkv": [s(128, 1, 4, 3, 128), s(128, 1, 8, 4, 128)],
            "o": [s(64, 4, 4, 3, 128), s(64, 1, 4, 3, 256)],
            "gate_up": [s(32, 1, 4, 3, 256), s(64, 1, 4, 3, 128), s(32, 1, 4, 4, 128)],
            "down": [s(64, 4, 4, 3, 128), s(64, 2, 4, 3, 256)],
            "head": [s(64, 1, 4, 3, 256), s(64, 1, 4, 3, 128)],
        }
    elif rows <= 8:
        chosen = {
            "qkv": [s(64, 2, 4, 3, 256), *found[:1], s(64, 2, 4, 2, 256)],
            "o": found[:1],
            "gate_up": [RegisterTiles(16, 64, 4, 4), s(64, 1, 4, 3, 256), s(64, 1, 4, 2, 128)],
            "down": found[:1],
            "head": [s(64, 1, 4, 3, 256), *found[:1], s(128, 1, 8, 3, 128)],
        }
    elif rows <= 16:
        chosen = {
            "qkv": [*found[:1], s(64, 2, 4, 3, 256)],
            "o": [*found[:1], s(64, 3, 4, 2, 256)],
            "gate_up": [s(64, 1, 4, 3, 128), s(64, 1, 4, 4, 128)],
            "down": [s(64, 4, 4, 3, 128), s(64, 4, 4, 3, 256)],
            "head": [s(128, 1, 8, 2, 128), s(64, 1, 4, 3, 256)],
        }
    elif rows <= 32:
        chosen = {
            "qkv": [s(128, 1, 8, 4, 128), s(128, 1, 8, 3, 128), s(64, 2, 4, 3, 256), s(64, 2, 4, 2, 256)],
            "o": [s(64, 2, 4, 4, 128), s(64, 3, 4, 2, 256)] if wide else [s(64, 3, 4, 2, 256), s(64, 3, 4, 4, 128)],
            "gate_up": [s(64, 1, 4, 3, 128), s(32, 1, 4, 2, 256)] if wide else [s(64, 1, 4, 3, 128), s(64, 1, 4, 4, 128)],
            "down": [s(64, 2, 4, 3, 256), s(64, 4, 4, 4, 128)] if wide else [s(64, 4, 4, 3, 256), s(64, 4, 4, 2, 256)],
            "head": [s(64, 1, 4, 3, 128), s(128, 1, 8, 6)] if wide else [s(128, 1, 8, 2, 128), s(64, 1, 4, 3, 128)],
        }
    elif rows <= 64:
        chosen = {
            "qkv": [s(128, 1, 8, 4, 128), s(128, 1, 8, 3, 128), "library"] if wide else ["library"],
            "o": [s(64, 1, 4, 4, 128), s(64, 2, 4, 3, 256)] if wide else [s(64, 3, 4, 4, 128), s(64, 3, 4, 2, 256)],
            "gate_up": [s(128, 1, 8, 2, 128), s(64, 1, 4, 3, 128)] if wide else [s(32, 1, 4, 3, 128), s(64, 1, 4, 3, 128)],
            "down": [s(64, 2, 4, 2, 256), s(64, 2, 4, 3, 256)] if wide else [s(64, 3, 4, 3, 256), s(64, 3, 4, 4, 128)],
            "head": [s(64, 1, 4, 2, 256), s(64, 1, 4, 3, 128)] if wide else [s(128, 1, 8, 2, 128), s(64, 1, 4, 3, 128)],
        }
    else:
        chosen = {
            "qkv": [s(128, 1, 8, 3, 128), "library"] if wide else ["library"],
            "o": ["library", s(64, 2, 8, 4, 128)] if wide else ["library"],
            "gate_up": [s(128, 1, 8, 2, 128), s(64, 1, 8, 3, 128)] if wide else [s(32, 1, 8, 4), s(64, 1, 8, 3, 128)],
            "down": [s(64, 2, 8, 4, 128), s(64, 2, 8, 6)] if wide else [s(64, 3, 8, 4, 128), s(64, 4, 8, 4, 128), "library"],
            "head": [s(128, 1, 8, 3, 128), s(64, 1, 8, 3)] if wide else [s(64, 1, 8, 2, 256), s(64, 1, 8, 3, 128)],
        }
    return chosen[op] + found


def _in_shared(op: str, rows: int, wide: bool) -> list[Choice]:
    splits = 1 if op == "head" else 2 if wide or (op == "o" and rows > 32) else 4
    sizes, chunk = ((128, 64, 32, 16), 64) if op == "head" else ((64, 32, 16), 128)
    return [TensorTiles(size, chunk, splits, 4, 5) for size in sizes]


def _few_kv_heads(config: ModelConfig) -> bool:
    """Whether a few rows leave multiprocessors idle unless contexts are divided more finely (8 rows of Llama-3-8B, with 8 KV
    heads: a step of 4 layers takes 1,007 us instead of 1,023, of contexts around 1,024 keys 1,049 instead of 1,110; H100)."""
    return config.num_kv_heads <= 8


def attention_candidates(config: ModelConfig, rows: int) -> list[SplitTiles]:
    """How attention may divide contexts, the likeliest first. Few rows gain from keys that are asked for before the launch's
    wait, many from small programs."""
    if not has_wgmma():
        keys = 64 if config.head_dim <= 128 else 32
        return [SplitTiles(512, 128, 4, 3) if config.head_dim <= 64 else SplitTiles(128, keys, 4, 2)]
    if config.head_dim <= 64:
        if rows <= 32:
            return [SplitTiles(512, 64, 8, 3, 512), SplitTiles(512, 128, 4, 5, 256)]
        if rows <= 64:
            return [SplitTiles(512, 64, 2, 5), SplitTiles(512, 64, 2, 7)]
        return [SplitTiles(512, 32, 1, 6, 16), SplitTiles(512, 32, 1, 7)]
    if config.head_dim <= 128:
        if rows == 1:
            return [SplitTiles(128, 64, 8, 1, 128), SplitTiles(256, 64, 8, 5, 256), SplitTiles(128, 64, 4, 2)]
        if _few_kv_heads(config) and rows <= 8:
            return [SplitTiles(256, 64, 8, 5, 256), SplitTiles(128, 64, 4, 2, 64), SplitTiles(512, 64, 8, 4, 128)]
        if _few_kv_heads(config) and rows <= 32:
            return [SplitTiles(512, 64, 4, 4, 128), SplitTiles(128, 64, 4, 2, 64)]
        if rows <= 8:
            return [SplitTiles(512, 32, 8, 6, 64), SplitTiles(512, 64, 8, 4, 128), SplitTiles(128, 64, 4, 2)]
        if rows <= 32:
            return [SplitTiles(512, 32, 1, 4, 32), SplitTiles(512, 64, 4, 4, 128)]
        return [SplitTiles(512, 32, 1, 4, 16), SplitTiles(512, 32, 2, 4, 32)]
    return [SplitTiles(128, 32, 4, 2)]


def far_candidates(config: ModelConfig, rows: int) -> list[SplitTiles]:
    """The same for contexts beyond NEAR: few rows need several programs for one of them, for many they may be longer, but not
    as long as all keys of one: contexts differ (64 rows of TinyLlama with 1,024 keys each: a step of 8 layers takes 701 us with
    2,048 keys a program, 712 with 512; with 4 to 2,044 keys 861 and 735)."""
    near = attention_candidates(config, rows)
    if not has_wgmma() or config.head_dim > 128:
        return near
    if config.head_dim <= 64:
        if rows == 1:
            return [SplitTiles(256, 64, 8, 3, 256), SplitTiles(128, 64, 4, 5), near[0]]
        if rows <= 8:
            return [near[0], SplitTiles(256, 64, 8, 3, 256)]
        if rows <= 16:
            return [SplitTiles(256, 64, 4, 5, 128), near[0]]
        if rows <= 32:
            return [SplitTiles(512, 32, 1, 6, 16), near[0]]
        found = [SplitTiles(512, 32, 1, 6, 16), SplitTiles(1024, 32, 1, 6, 16)]
        return found if rows <= 64 else found[::-1]
    if rows == 1:
        return [SplitTiles(128, 64, 8, 1, 128), SplitTiles(256, 64, 8, 5, 256)]
    if _few_kv_heads(config) and rows <= 8:
        return [SplitTiles(256, 32, 4, 5, 64), SplitTiles(256, 64, 4, 4, 64)]
    if _few_kv_heads(config) and rows <= 16:
        return [SplitTiles(256, 32, 1, 4, 32), SplitTiles(512, 32, 4, 6, 64)]
    if rows <= 16:
        return [SplitTiles(512, 32, 1, 4, 32), SplitTiles(256, 32, 4, 5, 64)]
    return [SplitTiles(512, 32, 1, 4, 32), SplitTiles(1024, 32, 1, 4, 16)]


def shared_candidates(config: ModelConfig, rows: int) -> list[int]:
    """Percents of a multiprocessor's memory as shared memory, the likeliest first."""
    if not has_wgmma():
        return [DRIVERS_CHOICE]
    if config.hidden_size >= 4096:
        likeliest = 0 if rows == 1 else 50 if rows <= 16 else 75
    elif rows <= 8 or 16 < rows <= 32:
        likeliest = 25
    else:
        likeliest = 75 if rows <= 64 else 100
    return list(dict.fromkeys([likeliest, 25, 50, 75, 100 if rows > 16 else 0, DRIVERS_CHOICE]))


def default_tiles(config: ModelConfig, rows: int, dtype: torch.dtype) -> StepTiles:
    """What an uncalibrated engine runs."""
    products = {op: candidates(config, op, rows, dtype)[0] for op in PRODUCTS}
    return StepTiles(**products, attention=attention_candidates(config, rows)[0], shared=shared_candidates(config, rows)[0],
                     far=far_candidates(config, rows)[0])  # fmt: skip
