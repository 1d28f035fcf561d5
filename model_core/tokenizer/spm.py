"""sentencepiece models: tokenizer.model files, and the same rebuilt from a GGUF vocabulary."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from sentencepiece import SentencePieceProcessor

from model_core.errors import CheckpointError, UnsupportedModel
from model_core.tokenizer.split import AddedToken, Splitter
from model_core.tokenizer.tokenizer import Codec

_SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # ModelProto.SentencePiece.Type; GGUF's are the same


def sentencepiece_codec(proto: bytes, *, origin: str, extra: Iterable[AddedToken] = (), add_bos: bool = True,
                        add_eos: bool = False, space_after_special: bool = True) -> Codec:
    """A codec over a serialised ModelProto.

    extra: tokens beyond the model's own (Hugging Face's added_tokens). space_after_special: text after a control token
    gets a leading space too, as the original Llama code, llama.cpp and "legacy" transformers tokenizers do.
    Raises CheckpointError for a damaged model, UnsupportedModel for one that puts spaces behind words.
    """
    try:
        backend = SentencePieceProcessor(model_proto=proto)
    except Exception as error:  # RuntimeError, or what the C++ status maps to
        raise CheckpointError(f"{origin}: not a sentencepiece model ({error})") from None
    prefixed = backend.normalize("a")
    if prefixed == "a" + _SPACE:
        raise UnsupportedModel(f"{origin}: treat_whitespace_as_suffix is not supported")
    adds_space = prefixed == _SPACE + "a"
    later = backend
    if adds_space and not space_after_special:
        later = SentencePieceProcessor(model_proto=proto)
        later.override_normalizer_spec(add_dummy_prefix=False)

    added = {token.text: token for token in extra}
    table: list[bytes] = []
    special: set[int] = set()
    size = backend.vocab_size()
    ids = list(range(size))
    for i, piece, is_byte, is_control, is_unknown in zip(
        ids, backend.id_to_piece(ids), backend.is_byte(ids), backend.is_control(ids), backend.is_unknown(ids),
        strict=True,
    ):
        table.append(bytes([int(piece[3:5], 16)]) if is_byte else piece.replace(_SPACE, " ").encode())
        if is_control or is_unknown:
            special.add(i)
            table[i] = piece.encode()
            added.setdefault(piece, AddedToken(piece, i))
    for token in added.values():
        table += [b""] * (token.id + 1 - len(table))
        table[token.id] = token.text.encode()

    own = [token for token in added.values() if not token.special]
    splitter = Splitter(own)

    def encode(text: str, first: bool) -> list[int]:
        if not own:
            return (backend if first else later).encode(text)
        found: list[int] = []
        for piece, token, start in splitter.split(text):
            if token is not None:
                found.append(token.id)
            else:
                found += (backend if first and start == 0 else later).encode(piece)
        return found

    bos, eos = backend.bos_id(), backend.eos_id()
    return Codec(
        encode=encode, token_bytes=table, added=[token for token in added.values() if token.special],
        prefix_ids=[bos] if add_bos and bos >= 0 else [], suffix_ids=[eos] if add_eos and eos >= 0 else [],
        strips_space=adds_space, bos_id=bos if bos >= 0 else None, eos_ids=(eos,) if eos >= 0 else (),
        special_ids=frozenset(special),
    )


@dataclass
class Vocabulary:
    """What a ModelProto is made of. kinds: ModelProto.SentencePiece.Type by id; ids -1 mean "none"."""

    pieces: list[str]
    scores: list[float]
    kinds: list[int]
    bos_id: int = -1
    eos_id: int = -1
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False
    precompiled_charsmap: bytes = b""


def model_proto(vocabulary: Vocabulary) -> bytes:
    """A BPE ModelProto (sentencepiece_model.proto, proto2 wire format): tag, then varint or length and bytes."""
    v = vocabulary
    if not len(v.pieces) == len(v.scores) == len(v.kinds):
        raise CheckpointError(f"the vocabulary has {len(v.pieces)} tokens, {len(v.scores)} scores and {len(v.kinds)} "
                              "token types; they must be as many")
    if UNKNOWN not in v.kinds:
        raise CheckpointError("the vocabulary has no token of type unknown, which sentencepiece needs")
    out = bytearray()
    for text, score, kind in zip(v.pieces, v.scores, v.kinds, strict=True):
        out += _bytes(1, _bytes(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind))
    bpe = 2
    trainer = _number(3, bpe) + _number(4, len(v.pieces)) + _number(35, int(BYTE in v.kinds))
    trainer += _number(40, v.kinds.index(UNKNOWN)) + _number(41, v.bos_id) + _number(42, v.eos_id) + _number(43, -1)
    for field, i in ((46, v.bos_id), (47, v.eos_id), (45, v.kinds.index(UNKNOWN))):  # bos_piece, eos_piece, unk_piece
        trainer += _bytes(field, v.pieces[i].encode()) if i >= 0 else b""
    normalizer = _bytes(1, b"identity") + _bytes(2, v.precompiled_charsmap) + _number(3, int(v.add_dummy_prefix))
    normalizer += _number(4, int(v.remove_extra_whitespaces)) + _number(5, 1)
    return bytes(out + _bytes(2, trainer) + _bytes(3, normalizer))


def _varint(value: int) -> bytes:
    value &= 0xFFFF_FFFF_FFFF_FFFF  # negative numbers are ten bytes of two's complement
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value
