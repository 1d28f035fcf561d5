"""GGUF metadata: the key-value header of a GGUF file, without its tensors.

Own reader, because gguf.GGUFReader keeps every array element as a numpy view: 4.8 s to open SmolLM2's file against
0.1 s here. Layout: GGUF specification, version 3 (ggml repository, docs/gguf.md); version 2 differs in nothing we read.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from model_core.errors import CheckpointError, UnsupportedModel

_MAGIC = b"GGUF"
_MAX_KEYS = 65_536
_MAX_ITEMS = 16_777_216  # of one array; the largest vocabularies have 0.3 million tokens and 0.6 million merges
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_U64 = struct.Struct("<Q")


def read_metadata(path: Path, prefix: str = "") -> dict[str, Any]:
    """Every metadata key of `path` that starts with `prefix`: numbers, bools, strings, and lists of them.

    Raises CheckpointError for a damaged file, UnsupportedModel for a version or byte order that is not read.
    """
    with open(path, "rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise CheckpointError(f"{path}: the file is empty") from None
        with data:
            try:
                return _Reader(data).metadata(path, prefix)
            except (struct.error, UnicodeDecodeError, IndexError) as error:
                raise CheckpointError(f"{path}: damaged GGUF header ({error}); download the file again") from None


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def metadata(self, path: Path, prefix: str) -> dict[str, Any]:
        if self.data[:4] != _MAGIC:
            raise CheckpointError(f"{path}: not a GGUF file")
        version = struct.unpack_from("<I", self.data, 4)[0]
        if version not in (2, 3):
            raise UnsupportedModel(f"{path}: GGUF version {version} is not supported (2 and 3, little-endian, are)")
        self.at = 16  # magic, version, tensor count
        count = self.count(_MAX_KEYS)
        found = {}
        for _ in range(count):
            key, kind = self.string(), self.scalar("I")
            if key.startswith(prefix):
                found[key] = self.value(kind)
            else:
                self.skip(kind)
        return found

    def scalar(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self.data, self.at)[0]
        self.at += struct.calcsize("<" + code)
        return value

    def count(self, limit: int) -> int:
        value = self.scalar("Q")
        if value > limit:
            raise struct.error(f"a count of {value} at byte {self.at - 8}, at most {limit} is possible")
        return value

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        # The loop that reads vocabularies: local names and one slice per string, 0.4 us each.
        data, at, unpack, end = self.data, self.at, _U64.unpack_from, len(self.data)
        found = []
        for _ in range(count):
            start = at + 8
            at = start + unpack(data, at)[0]
            if at > end:
                raise struct.error(f"a string ends past the end of the file, at byte {at}")
            found.append(data[start:at].decode())
        self.at = at
        return found

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.scalar("I"), self.count(_MAX_ITEMS)
            if item == _STRING:
                return self.strings(count)
            code = f"<{count}{self.code(item)}"
            values = list(struct.unpack_from(code, self.data, self.at))
            self.at += struct.calcsize(code)
            return values
        return self.scalar(self.code(kind))

    def skip(self, kind: int) -> None:
        if kind == _ARRAY:
            item, count = self.scalar("I"), self.count(_MAX_ITEMS)
            if item == _STRING:
                self.strings(count)
            else:
                self.at += count * struct.calcsize("<" + self.code(item))
        elif kind == _STRING:
            self.string()
        else:
            self.at += struct.calcsize("<" + self.code(kind))

    @staticmethod
    def code(kind: int) -> str:
        if kind not in _SCALARS:
            raise struct.error(f"value type {kind} is unknown here")
        return _SCALARS[kind]
