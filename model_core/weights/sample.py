"""Telling weights apart without reading them all: a digest of samples of their files."""

from __future__ import annotations

import hashlib
from pathlib import Path

_SAMPLES, _BYTES = 64, 4096  # per file: 0.4 ms, where all 97 MB of SmolLM2's take 150 (EPYC)


def sample_of(path: Path) -> str:
    """Of a GGUF file, or a folder's weights and config.json: a digest of sizes, and of bytes spread evenly over each file."""
    found = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.gguf"), *path.glob("config.json")]
    digest = hashlib.sha256()
    for file in sorted(found):
        size = file.stat().st_size
        digest.update(b"%d " % size)
        with file.open("rb") as data:
            for at in range(0, size, max(_BYTES, size // _SAMPLES)):
                data.seek(at)
                digest.update(data.read(_BYTES))
    return digest.hexdigest()
