"""How each product of a decode step is computed for a number of rows: by which kernel, with which tiles.

One row: every kernel streams its weights through registers ("rows"). Up to 32: weights in registers, tensor cores. Up to 64:
tiles in shared memory for the narrow products. Above: cuBLAS with a small kernel behind it. The tiles below were measured on an
H100 for hidden sizes 2048 and 4096 (microseconds of a chain of 22 or 8 layers, PDL on, 2026-11-25):

    TinyLlama-1.1B    qkv    o  gate_up  down   head      Llama-2-7B   qkv    o  gate_up  down   head
    limit             3.5  2.8     15.2   7.6   43.3                  33.2 11.1     59.5  29.8   86.5
    1 row, rows       4.4  4.0     15.9   9.0   45.6                  33.8 13.5     58.3  30.6   85.7
    1 row, cuBLAS     7.0  6.5     18.4  12.8   52.6                  37.5 16.7     71.5  36.0  100.5
    8, registers      5.4  4.6     17.8  10.6   48.7                  37.5 14.0     61.4  32.3   91.3
    8, shared         8.3  6.2     18.7  11.2   48.9                  37.7 15.1     66.1  35.7   93.9
    8, cuBLAS         7.0  6.5     18.6  12.8   53.3                  37.0 16.9     72.1  36.5  102.4
    32, registers     8.3  7.5     20.4  14.5   56.8                  43.9 17.3     74.5  37.4  104.6
    32, shared       10.3  6.0     22.3  11.0   52.7                  45.2 15.1     72.6  34.5   99.8
    32, cuBLAS        7.2  6.7     19.2  13.4   54.2                  39.5 15.4     68.3  38.2  101.7
    64, shared       10.7  7.5     23.6  11.9   55.0                  44.7 18.1     75.2  36.6  102.5
    64, cuBLAS        7.3  6.8     19.5  13.8   54.9                  39.1 16.3     73.0  38.8  101.6
    128, shared      15.6  9.5     23.6  17.0   62.3                  55.8 22.4     85.3  43.4  110.3
    128, cuBLAS       7.8  6.9     21.8  14.1   61.8                  40.4 16.4     73.6  41.3  106.8

cuBLAS needs a kernel behind each product, the others do not. `mini-llm dispatch MODEL --all` shows what was measured here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from model_core.kernels.decode.attention import SplitTiles
from model_core.kernels.decode.products import RowTiles
from model_core.kernels.decode.registers import RegisterTiles
from model_core.kernels.decode.tiles import TensorTiles
from model_core.model.config import ModelConfig

Library = Literal["library"]
Choice = RowTiles | RegisterTiles | TensorTiles | Library
PRODUCTS = ("qkv", "o", "gate_up", "down", "head")
MOST_ROWS = 1  # that the plain row kernels take: with two the tensor cores are as fast
MOST_IN_REGISTERS = 32
MOST_IN_SHARED = 64


@dataclass(frozen=True)
class StepTiles:
    """One choice per product, for steps of one bucket of rows: RowTiles for all, or for none."""

    qkv: Choice
    o: Choice
    gate_up: Choice
    down: Choice
    head: Choice

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
    if op in ("qkv", "gate_up") and not isinstance(choice, TensorTiles):
        each //= 2  # they count both rows of a pair
    if each < 1 or rows % each or (op == "qkv" and config.head_dim // 2 % each):
        return False
    if isinstance(choice, RegisterTiles):
        return choice.divides(width)
    return not (op == "head" and isinstance(choice, TensorTiles) and choice.splits > 1)


def candidates(config: ModelConfig, op: str, rows: int, dtype: torch.dtype) -> list[Choice]:
    """What may compute a product for `rows` rows, the likeliest first; the last always fits. float32 has no tensor cores here
    (tf32 would be less): beyond one row it is cuBLAS's."""
    wide = config.hidden_size >= 4096
    found: list[Choice] = []
    if rows <= MOST_ROWS:
        found += {
            "qkv": [RowTiles(8, 2048, 2), RowTiles(2, 1024, 4), RowTiles(4, 1024, 2)],
            "o": [RowTiles(4, 2048, 8) if wide else RowTiles(4, 512, 8), RowTiles(2, 2048, 4), RowTiles(2, 1024, 4)],
            "gate_up": [RowTiles(2, 1024, 8) if wide else RowTiles(2, 1024, 4), RowTiles(2, 512, 4)],
            "down": [RowTiles(2, 2048, 4) if wide else RowTiles(2, 2048, 8), RowTiles(2, 1024, 4)],
            "head": [RowTiles(1, 2048, 4) if wide else RowTiles(2, 2048, 8), RowTiles(1, 1024, 2)],
        }[op]  # fmt: skip
        smallest = RowTiles(2 if op in ("qkv", "gate_up") else 1, 1024, 4)
        return [choice for choice in found if fits(config, op, choice)] + [smallest]
    if dtype == torch.float32:
        return ["library"]
    if rows <= MOST_IN_REGISTERS and (rows <= 16 or (not wide and op in ("qkv", "gate_up"))):
        found += {
            "qkv": [RegisterTiles(32, 64, 4, 4)] * wide + [RegisterTiles(16, 64, 8, 4), RegisterTiles(16, 64, 4, 4)],
            "o": [RegisterTiles(16, 256, 2, 4)] * (rows <= 16) + [RegisterTiles(16, 128, 4, 4), RegisterTiles(16, 64, 8, 4)],
            "gate_up": [RegisterTiles(16, 128, 4, 2 if wide else 4)] * (rows <= 8)
            + [RegisterTiles(32, 128, 1, 4)] * (rows <= 16) + [RegisterTiles(16, 64, 4, 2)],
            "down": [RegisterTiles(16, 64, 8, 4)] * wide + [RegisterTiles(16, 128, 4, 4), RegisterTiles(16, 64, 8, 4)],
            "head": [RegisterTiles(16, 64, 8, 4 if rows <= 8 else 2), RegisterTiles(16, 128, 4, 2)],
        }[op]  # fmt: skip
        found += [RegisterTiles(16, chunk, depth, warps) for warps in (4, 2, 1) for chunk in (64, 32) for depth in (4, 2, 1)]
    if rows <= MOST_IN_SHARED and op in ("o", "down", "head"):
        splits = 1 if op == "head" else 2 if wide or (op == "o" and rows > 32) else 4
        sizes, chunk = ((128, 64, 32, 16), 64) if op == "head" else ((64, 32, 16), 128)
        found += [TensorTiles(size, chunk, splits, 4, 5) for size in sizes]
    return [choice for choice in found if fits(config, op, choice)] + ["library"]


def default_tiles(config: ModelConfig, rows: int, dtype: torch.dtype) -> StepTiles:
    """What an uncalibrated engine runs."""
    return StepTiles(**{op: candidates(config, op, rows, dtype)[0] for op in PRODUCTS})


def default_split(config: ModelConfig) -> SplitTiles:
    """One for all batches: a row's sums must not depend on its batch. Few wide heads gain from many programs, many narrow
    ones from none (H100, 257 keys, microseconds for 1, 8, 64 and 256 rows: TinyLlama 7.2, 7.2, 12.5, 34; 7B 8.5, 21, 107)."""
    if config.head_dim <= 64:
        return SplitTiles(512, 128, 4, 3)
    return SplitTiles(128, 64, 4, 2) if config.head_dim <= 128 else SplitTiles(128, 32, 4, 2)
