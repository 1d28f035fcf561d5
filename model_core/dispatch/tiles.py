"""How each product of a decode step is computed for a number of rows: by which kernel, with which tiles.

For one or two rows every kernel streams its weights through registers. Above that each product is a tensor-core kernel of
ours, or cuBLAS with a small kernel behind it. What stands here holds where nothing was measured; calibration
(calibrate.py) replaces it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from model_core.kernels.decode.attention import SplitTiles
from model_core.kernels.decode.products import RowTiles
from model_core.kernels.decode.tiles import TensorTiles
from model_core.model.config import ModelConfig

Library = Literal["library"]
Choice = RowTiles | TensorTiles | Library
PRODUCTS = ("qkv", "o", "gate_up", "down", "head")
MOST_ROWS = 2  # rows of a step that the register kernels take; three of them take longer than tensor cores (H100)


@dataclass(frozen=True)
class StepTiles:
    """One choice per product, for steps of one bucket of rows: all RowTiles, or none."""

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
    rows, _ = product_shape(config, op)
    pairs = op in ("qkv", "gate_up")
    each = choice.rows // 2 if pairs and isinstance(choice, RowTiles) else choice.rows
    within_head = op != "qkv" or config.head_dim // 2 % max(1, each) == 0
    return each >= 1 and rows % each == 0 and within_head and not (op == "head" and getattr(choice, "splits", 1) > 1)


def row_tiles(config: ModelConfig, op: str) -> RowTiles:
    """A few thousand elements of W per warp; measured on an H100 for hidden sizes 2048 and 4096."""
    wanted = {"qkv": RowTiles(8, 1024, 4), "o": RowTiles(2, 2048, 4), "gate_up": RowTiles(2, 1024, 4),
              "down": RowTiles(2, 2048, 8), "head": RowTiles(2, 2048, 8)}[op]  # fmt: skip
    while not fits(config, op, wanted):
        assert wanted.rows > 1, (op, config)
        wanted = replace(wanted, rows=wanted.rows // 2)
    return wanted


def tensor_tiles(config: ModelConfig, op: str, rows: int) -> Choice:
    """The widest of a few shapes that divides the model's; cuBLAS where its tiles pay (many rows)."""
    if rows > 64 or (rows > 32 and op in ("qkv", "gate_up")):
        return "library"
    splits = {"qkv": 4, "o": 4, "gate_up": 2 if rows <= 8 else 1, "down": 4, "head": 1}[op]
    for size in (32, 16) if op in ("qkv", "gate_up") else (64, 32, 16):
        tiles = TensorTiles(size, 128, splits, 4, 4)
        if fits(config, op, tiles):
            return tiles
    return "library"


def default_tiles(config: ModelConfig, rows: int) -> StepTiles:
    """What an uncalibrated engine runs."""
    if rows <= MOST_ROWS:
        return StepTiles(**{op: row_tiles(config, op) for op in PRODUCTS})
    return StepTiles(**{op: tensor_tiles(config, op, rows) for op in PRODUCTS})


def default_split(config: ModelConfig) -> SplitTiles:
    """One for all batches: a row's sums must not depend on its batch."""
    return SplitTiles(128, 64, 4, 3) if config.head_dim <= 128 else SplitTiles(128, 32, 4, 2)
