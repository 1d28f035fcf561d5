"""The host's side of the device's block tables: what of them the device has, and how the rest reaches it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from model_core.engine.packed import Packed
from model_core.engine.sequence import Sequence
from model_core.kernels.decode.state import DecodeState

_UPDATES = 4096  # entries that one copy brings to the device


class BlockTables:
    """Writes state.block_tables. Entries of a slot's table are only ever added, until `clear` says that a sequence begins
    there."""

    def __init__(self, state: DecodeState, device: torch.device) -> None:
        self._flat, self._width = state.block_tables.view(-1), state.block_tables.shape[1]
        self._known = [0] * state.block_tables.shape[0]  # entries of each slot's table that the device has
        self._updates = Packed([("where", _UPDATES, "int64"), ("page", _UPDATES, "int32")], device)

    def clear(self, slot: int) -> None:
        self._known[slot] = 0

    def write(self, seqs: Iterable[Sequence]) -> None:
        """Bring the tables of these sequences up to date."""
        where: list[int] = []
        pages: list[int] = []
        for seq in seqs:
            slot, table = seq.slot, seq.block_table
            assert slot is not None
            known, base = self._known[slot], slot * self._width
            where += range(base + known, base + len(table))
            pages += table[known:]
            self._known[slot] = len(table)
        for first in range(0, len(where), _UPDATES):
            count = min(_UPDATES, len(where) - first)
            host, device = self._updates.turn(), self._updates.device
            host["where"][:count] = where[first : first + count]
            host["page"][:count] = pages[first : first + count]
            self._updates.send()
            self._flat.index_copy_(0, device["where"][:count], device["page"][:count])
