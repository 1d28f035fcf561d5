"""The GGUF container: metadata and tensor directory, without reading the weights. No torch here.

Source: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3. The `gguf` package has a reader too, but it makes
several Python objects for every token of the vocabulary: 3.2 s for SmolLM2's 98,000 strings, where this takes 0.08 s
(2 cores, AMD EPYC); importing it costs another 0.5 s.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model_core.errors import CheckpointError, UnsupportedModel

_MAGIC = b"GGUF"
_NUMBERS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_STRING, _ARRAY = 8, 9

# GGML type code -> (name, elements of a block, bytes of a block).
_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 28: ("F64", 1, 8), 30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18), 23: ("IQ4_XS", 256, 136),
}  # fmt: skip
_MAX_DIMENSIONS = 4
_MAX_NESTING = 4


@dataclass(frozen=True)
class GGUFTensor:
    """One entry of the tensor directory. `shape` is row-major, outermost first, as torch has it."""

    name: str
    shape: tuple[int, ...]
    type: str  # the GGML name: "F32", "Q4_1", ...
    offset: int  # bytes from the start of the file
    nbytes: int


class GGUFFile:
    """An open GGUF file: `metadata` (key -> bool, int, float, str or list of them) and `tensors` by name.

    Raises CheckpointError for a truncated or damaged file, UnsupportedModel for a version or tensor type that is not
    known. The weights stay on disk until `raw` is called.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Copy-on-write: pages are shared with the page cache as in a read-only map, and torch accepts the array.
            self._bytes = np.memmap(path, dtype=np.uint8, mode="c")
        except ValueError:
            raise CheckpointError(f"{path} is empty") from None
        self._cursor = _Cursor(path, self._bytes.data)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        self._read()

    def _read(self) -> None:
        cursor = self._cursor
        if bytes(cursor.take(4)) != _MAGIC:
            raise CheckpointError(f"{self.path} is not a GGUF file (it does not begin with 'GGUF')")
        version = cursor.number("<I")
        if version not in (2, 3):
            raise UnsupportedModel(f"{self.path} is GGUF version {version}; versions 2 and 3 (little-endian) are read")
        tensor_count, pair_count = cursor.number("<Q"), cursor.number("<Q")
        for _ in range(pair_count):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.number("<I"))
        entries = [self._entry() for _ in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
            raise CheckpointError(f"{self.path}: general.alignment {alignment!r} is not a positive multiple of 8")
        start = -(-cursor.position // alignment) * alignment
        for name, shape, kind, offset in entries:
            label, block, block_bytes = _TYPES[kind]
            if not shape or shape[-1] % block:
                raise CheckpointError(
                    f"{self.path}: tensor {name!r} of shape {shape} is not made of whole {label} blocks of {block}")
            nbytes = int(np.prod(shape, dtype=object)) // block * block_bytes
            if start + offset + nbytes > len(self._bytes):
                raise CheckpointError(
                    f"{self.path} is truncated: tensor {name!r} ends at byte {start + offset + nbytes} of "
                    f"{len(self._bytes)}; fetch the file again")
            if name in self.tensors:
                raise CheckpointError(f"{self.path}: tensor {name!r} is listed twice")
            if offset % alignment:
                raise CheckpointError(f"{self.path}: tensor {name!r} begins at {offset}, no multiple of {alignment}")
            self.tensors[name] = GGUFTensor(name, shape, label, start + offset, nbytes)
        placed = sorted(self.tensors.values(), key=lambda tensor: tensor.offset)
        for one, other in zip(placed, placed[1:], strict=False):
            if one.offset + one.nbytes > other.offset:
                raise CheckpointError(f"{self.path}: tensors {one.name!r} and {other.name!r} overlap")

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        cursor = self._cursor
        name = cursor.string()
        dimensions = cursor.number("<I")
        if dimensions > _MAX_DIMENSIONS:
            raise CheckpointError(f"{self.path}: tensor {name!r} has {dimensions} dimensions, limit {_MAX_DIMENSIONS}")
        shape = tuple(cursor.number("<Q") for _ in range(dimensions))[::-1]
        code = cursor.number("<I")
        if code not in _TYPES:
            readable = ", ".join(label for label, _, _ in _TYPES.values())
            raise UnsupportedModel(f"{self.path}: tensor {name!r} is of GGML type {code}; those read are {readable}")
        return name, shape, code, cursor.number("<Q")

    def raw(self, tensor: GGUFTensor) -> np.ndarray:
        """The tensor's bytes as stored: uint8 [rows..., bytes of a row], mapped, not copied."""
        flat = self._bytes[tensor.offset : tensor.offset + tensor.nbytes]
        return flat.reshape(*tensor.shape[:-1], -1)


class _Cursor:
    """Reads the header front to back; every length is checked against what is left of the file."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self._path, self._data, self.position = path, data, 0

    def take(self, count: int) -> memoryview:
        begin, end = self.position, self.position + count
        if end > len(self._data):
            raise CheckpointError(
                f"{self._path} is truncated or damaged: its header asks for byte {end} of {len(self._data)}")
        self.position = end
        return self._data[begin:end]

    def number(self, code: str) -> int:
        value: int = struct.unpack(code, self.take(struct.calcsize(code)))[0]
        return value

    def string(self) -> str:
        return str(self.take(self.number("<Q")), "utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            element, count = self.number("<I"), self.number("<Q")
            if element in _NUMBERS:
                dtype = np.dtype(_NUMBERS[element])
                return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
            if element == _STRING:
                return self._strings(count)
            if depth >= _MAX_NESTING:
                raise CheckpointError(f"{self._path}: metadata arrays are nested deeper than {_MAX_NESTING}")
            return [self.value(element, depth + 1) for _ in range(count)]
        if kind not in _NUMBERS:
            raise CheckpointError(f"{self._path}: unknown metadata type {kind} at byte {self.position}")
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()

    def _strings(self, count: int) -> list[str]:
        # Vocabularies and merges: this loop, not `string`, because it is half the time of opening a file.
        data, position, end = self._data, self.position, len(self._data)
        length_of = struct.Struct("<Q").unpack_from
        found = []
        for _ in range(count):
            if position + 8 > end:
                self.take(end + 1 - self.position)
            begin = position + 8
            position = begin + length_of(data, position)[0]
            if position > end:
                self.take(position - self.position)
            found.append(str(data[begin:position], "utf-8", "replace"))
        self.position = position
        return found
