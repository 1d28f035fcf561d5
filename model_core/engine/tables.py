"""The host's side of the device's block tables: what of them the device has, and how the rest reaches it."""

from __future__ import annotations

import torch

from model_core.engine.packed import Packed
from model_core.engine.sequence import Sequence
from model_core.kernels.decode.state import DecodeState

_UPDATES = 4096  # entries that one copy brings to the device
_COPIES = 4  # sequences whose entries are copied each to its place: scattering takes the host longer, 161 us for one (H100)


class BlockTables:
    """Writes state.block_tables. Entries of a slot's table are only ever added, until `clear` says that a sequence begins
    there."""

    def __init__(self, state: DecodeState, device: torch.device) -> None:
        self._tables, self._flat, self._width = state.block_tables, state.block_tables.view(-1), state.block_tables.shape[1]
        self._known = [0] * state.block_tables.shape[0]  # entries of each slot's table that the device has
        self._updates = Packed([("where", _UPDATES, "int64"), ("page", _UPDATES, "int32")], device)
        self._rows = Packed([("pages", _COPIES * self._width, "int32")], device)

    def clear(self, slot: int) -> None:
        self._known[slot] = 0

    def write(self, seqs: list[Sequence]) -> None:
        """Bring the tables of these sequences up to date."""
        if 0 < len(seqs) <= _COPIES:
            self._copy(seqs)
        elif seqs:
            self._scatter(seqs)

    def _copy(self, seqs: list[Sequence]) -> None:
        host, at = self._rows.turn()["pages"], 0
        for seq in seqs:
            slot, table = seq.slot, seq.block_table
            assert slot is not None
            known, self._known[slot] = self._known[slot], len(table)
            count = len(table) - known
            host[at : at + count] = table[known:]
            self._rows.copy(self._tables, 4 * (slot * self._width + known), 4 * at, 4 * count)
            at += count
        self._rows.sent()

    def _scatter(self, seqs: list[Sequence]) -> None:
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
