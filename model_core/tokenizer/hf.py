"""tokenizer.json, read and run by the `tokenizers` library."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import orjson
from tokenizers import Tokenizer as Backend

from model_core.errors import CheckpointError, UnsupportedModel
from model_core.tokenizer.split import AddedToken
from model_core.tokenizer.tokenizer import Codec


def load_tokenizer_json(path: Path) -> Codec:
    """Raises CheckpointError for a damaged file, UnsupportedModel for a decoder that cannot be followed by bytes."""
    raw = path.read_bytes()
    try:
        spec = orjson.loads(raw)
        backend = Backend.from_buffer(raw)
        vocab = spec["model"].get("vocab")
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{path}: not a tokenizer.json that this version reads ({error})") from None
    if not isinstance(vocab, dict):
        raise UnsupportedModel(f"{path}: model type {spec['model'].get('type')!r} is not supported; only BPE is")
    added = [
        AddedToken(token["content"], token["id"], special=token.get("special", False),
                   lstrip=token.get("lstrip", False), rstrip=token.get("rstrip", False))
        for token in spec.get("added_tokens") or []
    ]
    byte_level, strips = _decoder(spec.get("decoder"), path)
    return codec_of(backend, vocab, added, byte_level=byte_level, strips_space=strips,
                    continuation=_continuation(spec))


def codec_of(backend: Backend, vocab: dict[str, int], added: list[AddedToken], *, byte_level: bool,
             strips_space: bool = False, continuation: Backend | None = None) -> Codec:
    """A codec over a ready backend. `continuation` encodes text that follows a control token, if that differs."""
    for one in (backend, continuation):
        if one is not None:
            one.no_truncation()
            one.no_padding()
            one.encode_special_tokens = True  # control tokens in text are text; those obeyed are cut out before
    later = continuation or backend

    def encode(text: str, first: bool) -> list[int]:
        return (backend if first else later).encode(text, add_special_tokens=False).ids

    table = [b""] * (1 + max([*vocab.values(), *(token.id for token in added)]))
    as_bytes = _byte_level_bytes if byte_level else _byte_fallback_bytes
    for token, i in vocab.items():
        table[i] = as_bytes(token)
    for added_token in added:
        table[added_token.id] = as_bytes(added_token.text)
    prefix, suffix = _surroundings(backend)
    return Codec(encode=encode, token_bytes=table, added=[token for token in added if token.special],
                 prefix_ids=prefix, suffix_ids=suffix, strips_space=strips_space)


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's bijection between bytes and printable characters (Radford et al. 2019): printable Latin-1 bytes are
    themselves, the others are U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(rest)}


BYTE_OF = _byte_level_alphabet()
_TRANSLATION = {ord(char): byte for char, byte in BYTE_OF.items()}


def _byte_level_bytes(token: str) -> bytes:
    # As the library decodes: a token with any character outside the alphabet is taken literally.
    if token.isascii() and " " not in token and token.isprintable():
        return token.encode()
    if BYTE_OF.keys() >= set(token):
        return token.translate(_TRANSLATION).encode("latin-1")
    return token.encode()


def _byte_fallback_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token[5] == ">":
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace("\u2581", " ").encode()


def _decoder(spec: dict[str, Any] | None, path: Path) -> tuple[bool, bool]:
    """Whether tokens are byte-level, and whether one leading space is dropped."""
    steps = spec.get("decoders", [spec]) if spec else []
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return True, False
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"]:
        replace_ok = steps[0].get("pattern") == {"String": "\u2581"} and steps[0].get("content") == " "
        if replace_ok and len(steps) == 3:
            return False, False
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        if replace_ok and len(steps) == 4 and steps[3] == strip:
            return False, True
    raise UnsupportedModel(f"{path}: decoder {' + '.join(kinds) or None!r} is not supported; ByteLevel, and Replace + "
                           "ByteFallback + Fuse (+ Strip) are")


def _continuation(spec: dict[str, Any]) -> Backend | None:
    """For Metaspace with prepend_scheme "first": the same tokenizer without the prefix, for text after a control token.

    The library looks at the offset in the whole text; pieces that were cut out before it no longer have one.
    """
    spec = copy.copy(spec)
    before = spec.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    if not any(step.get("type") == "Metaspace" and step.get("prepend_scheme") == "first" for step in steps):
        return None
    steps = [{**step, "prepend_scheme": "never"} if step.get("type") == "Metaspace" else step for step in steps]
    spec["pre_tokenizer"] = {**before, "pretokenizers": steps} if "pretokenizers" in before else steps[0]
    return Backend.from_buffer(orjson.dumps(spec))


def _surroundings(backend: Backend) -> tuple[list[int], list[int]]:
    """What the post-processor puts before and after a text."""
    inner = backend.encode("a", add_special_tokens=False).ids
    outer = backend.encode("a", add_special_tokens=True).ids
    extra = len(outer) - len(inner)
    for n in range(extra + 1):
        if outer[n : n + len(inner)] == inner:
            return outer[:n], outer[n + len(inner) :]
    return [], []
