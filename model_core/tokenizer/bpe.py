"""Byte-level BPE from a vocabulary and its merges, as GGUF stores them: the pre-tokenizer is named, not described."""

from __future__ import annotations

from tokenizers import AddedToken as BackendToken
from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from model_core.errors import CheckpointError, UnsupportedModel
from model_core.tokenizer.hf import codec_of
from model_core.tokenizer.split import AddedToken
from model_core.tokenizer.tokenizer import Codec

# Split expressions, applied one after another; what lies between matches is a piece too. From the models' published
# tokenizer.json files; the names are those that llama.cpp's converter writes into tokenizer.ggml.pre.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_LLAMA3 = _CL100K.replace("{DIGITS}", "{1,3}")
_QWEN2 = _CL100K.replace("{DIGITS}", "")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2", "olmo"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
}
# A piece that is a token is not merged from its bytes (ignore_merges); the same models want a bos.
WHOLE_WORDS = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "tekken"})
ADD_BOS = WHOLE_WORDS  # unless the file says otherwise
_NORMALIZED = frozenset({"qwen2", "deepseek-r1-qwen"})  # composed (NFC), as their tokenizer.json does


def byte_level_codec(tokens: list[str], merges: list[str], added: list[AddedToken], pre: str) -> Codec:
    """Raises UnsupportedModel for a pre-tokenizer that is not known, CheckpointError for merges that do not fit."""
    if pre not in PRE_TOKENIZERS:
        raise UnsupportedModel(f"tokenizer.ggml.pre is {pre!r}, a pre-tokenizer that is not supported; supported: "
                               f"{', '.join(sorted(PRE_TOKENIZERS))}; a tokenizer.json beside the file would be used")
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
        backend = Backend(models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre in WHOLE_WORDS))
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"tokenizer.ggml.merges does not fit the vocabulary: {error}") from None
    if pre in _NORMALIZED:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[pre]),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    backend.add_special_tokens([BackendToken(token.text, normalized=False) for token in added if token.special])
    backend.add_tokens([BackendToken(token.text, normalized=False) for token in added if not token.special])
    return codec_of(backend, vocab, added, byte_level=True)
