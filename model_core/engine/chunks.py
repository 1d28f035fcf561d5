"""Chunks of sequences as the inputs of a prefill graph: one after another, all in arrays that one copy brings to the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from model_core.engine.plan import Scheduled
from model_core.engine.sampler import divisor
from model_core.model.batch import blocks_of


def fields_of(tokens: int, seqs: int, blocks: int) -> list[tuple[str, int, str]]:
    """Names, sizes and types of the inputs of a graph for so many tokens, sequences and blocks of query tokens.

    Token ids below 0 stand for a token that is only on the device: -1 - slot. Sequences that sample name their slot in
    `sample_slots`, the others the dump slot.
    """
    return [
        ("token_ids", tokens, "int32"), ("positions", tokens, "int32"), ("slot_mapping", tokens, "int64"),
        ("query_start", seqs + 1, "int32"), ("context_len", seqs, "int32"), ("slots", seqs, "int32"),
        ("sample_slots", seqs, "int64"), ("logit_rows", seqs, "int32"), ("temperature", seqs, "float32"),
        ("seed", seqs, "int64"), ("blocks", 2 * blocks, "int32"),
    ]  # fmt: skip


@dataclass
class Chunks:
    """Entries of a plan, with their counts, starts and slots [len(entries)], and ends, each one's first token after it in the
    batch."""

    entries: list[Scheduled]
    counts: np.ndarray
    starts: np.ndarray
    slots: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, entries: list[Scheduled]) -> Chunks:
        numbers = np.array([(count, start, seq.slot) for seq, start, count, _ in entries], dtype=np.int32)
        counts, starts, slots = numbers.T
        return cls(entries, counts, starts, slots, counts.cumsum())

    def fill(self, h: dict[str, np.ndarray], page_size: int, block: int, dump: int) -> None:
        """Write the inputs; what is left of a graph's room writes to the dump page, of the dump slot. block: query tokens that
        a program takes."""
        total, seqs = int(self.ends[-1]), len(self.entries)
        self._fill_tokens(h, page_size)
        for name in ("token_ids", "positions", "slot_mapping"):
            h[name][total:] = 0
        h["query_start"][0], h["query_start"][1 : seqs + 1], h["query_start"][seqs + 1 :] = 0, self.ends, total
        h["context_len"][:seqs], h["context_len"][seqs:] = self.starts + self.counts, 1
        h["slots"][:seqs], h["slots"][seqs:] = self.slots, dump
        sampled = h["sample_slots"]
        sampled[:seqs], sampled[seqs:] = self.slots, dump
        h["logit_rows"][:seqs], h["logit_rows"][seqs:] = self.ends - 1, 0
        h["temperature"][seqs:] = 0.0
        temperature, seed = h["temperature"], h["seed"]
        for row, (seq, _, _, samples) in enumerate(self.entries):
            params = seq.request.params
            temperature[row], seed[row] = divisor(params.temperature), params.seed
            if not samples:
                sampled[row] = dump
        blocks = np.array(blocks_of(self.counts.tolist(), block), dtype=np.int32).ravel()
        h["blocks"][: len(blocks)], h["blocks"][len(blocks) :] = blocks, -1

    def _fill_tokens(self, h: dict[str, np.ndarray], size: int) -> None:
        ids, positions, mapping, at = h["token_ids"], h["positions"], h["slot_mapping"], 0
        within = np.arange(size)
        for seq, start, count, _ in self.entries:
            tokens, table, end = seq.tokens, seq.block_table, start + count
            if count == 1:  # maybe one that a step in flight samples: only the device knows it
                assert seq.slot is not None
                ids[at] = tokens[start] if start < len(tokens) else -1 - seq.slot
                positions[at] = start
                mapping[at] = table[start // size] * size + start % size
            else:
                known = np.frombuffer(seq.request.ids, dtype=np.uint32) if end <= seq.num_prompt else tokens
                ids[at : at + count] = known[start:end]
                positions[at : at + count] = np.arange(start, end)
                pages = np.array(table[start // size : -(-end // size)], dtype=np.int64)
                mapping[at : at + count] = (pages[:, None] * size + within).ravel()[start % size :][:count]
            at += count
