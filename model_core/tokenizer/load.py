"""From a model folder or a GGUF file to a Tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model_core.errors import CheckpointError, UnsupportedModel
from model_core.tokenizer.chat import ChatTemplate
from model_core.tokenizer.split import AddedToken
from model_core.tokenizer.tokenizer import Codec, Tokenizer

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_MAX_CONFIG_BYTES = 64 * 1024 * 1024
# Many GGUF files name only one end token; a chat model may end its turn with another. As llama.cpp, go by the text.
_END_TEXTS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "</s>")


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a model folder (tokenizer.json, else tokenizer.model, else a GGUF file's) or of a GGUF file.

    Raises CheckpointError for missing or damaged files, UnsupportedModel for formats that are not run.
    """
    path = Path(path)
    if path.is_file():
        return _from_gguf(path)
    if (path / "tokenizer.json").is_file():
        from model_core.tokenizer.hf import load_tokenizer_json

        return _from_folder(path, load_tokenizer_json(path / "tokenizer.json"))
    if (path / "tokenizer.model").is_file():
        return _from_folder(path, _sentencepiece(path))
    files = sorted(path.glob("*.gguf"))
    if files:
        return _from_gguf(files[0])
    raise CheckpointError(f"{path}: no tokenizer.json, tokenizer.model or *.gguf; the model folder is incomplete")


def _from_folder(path: Path, codec: Codec) -> Tokenizer:
    config = _json(path / "tokenizer_config.json")
    named = {**_named_tokens(_json(path / "special_tokens_map.json")), **_named_tokens(config)}
    ids = {token.text: token.id for token in codec.added}
    if named.get("bos_token") in ids:
        codec.bos_id = ids[named["bos_token"]]
    ends = [ids[named["eos_token"]]] if named.get("eos_token") in ids else list(codec.eos_ids)
    declared = _json(path / "generation_config.json").get("eos_token_id")
    ends += declared if isinstance(declared, list) else [] if declared is None else [declared]
    codec.eos_ids = tuple(dict.fromkeys(i for i in ends if isinstance(i, int) and 0 <= i < len(codec.token_bytes)))
    return Tokenizer(codec, _chat_template(path, config, named))


def _sentencepiece(path: Path) -> Codec:
    from model_core.tokenizer.spm import sentencepiece_codec

    config = _json(path / "tokenizer_config.json")
    extra = [
        AddedToken(token["content"], int(i), special=token.get("special", False), lstrip=token.get("lstrip", False),
                   rstrip=token.get("rstrip", False))
        for i, token in config.get("added_tokens_decoder", {}).items()
    ]
    known = {token.text for token in extra}
    named = set(_named_tokens(_json(path / "special_tokens_map.json")).values()) | set(_named_tokens(config).values())
    extra += [
        AddedToken(text, i, special=text in named)
        for text, i in _json(path / "added_tokens.json").items() if text not in known
    ]
    return sentencepiece_codec(
        (path / "tokenizer.model").read_bytes(), origin=str(path / "tokenizer.model"), extra=extra,
        add_bos=config.get("add_bos_token", True), add_eos=config.get("add_eos_token", False),
        space_after_special=config.get("legacy") is not False,
    )


def _chat_template(path: Path, config: dict[str, Any], named: dict[str, str]) -> ChatTemplate | None:
    """chat_template.jinja wins over tokenizer_config.json, that over chat_template.json."""
    file = path / "chat_template.jinja"
    found = config.get("chat_template") or _json(path / "chat_template.json").get("chat_template") or {}
    if isinstance(found, str):
        found = {"default": found}
    elif isinstance(found, list) and all(isinstance(one, dict) for one in found):
        found = {one.get("name"): one.get("template") for one in found}
    templates = _checked(found, path)
    if file.is_file():
        try:
            templates = {**templates, "default": file.read_text(encoding="utf-8")}
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file}: not UTF-8 text ({error})") from None
    return ChatTemplate(templates, named) if templates else None


def _checked(templates: Any, origin: Path) -> dict[str, str]:
    if isinstance(templates, dict) and all(isinstance(text, str) for pair in templates.items() for text in pair):
        return templates
    raise CheckpointError(f"{origin}: its chat_template is neither text nor texts by name")


def _from_gguf(path: Path) -> Tokenizer:
    from model_core.tokenizer.gguf import read_metadata

    metadata = read_metadata(path, "tokenizer.")
    meta = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    for key in ("model", "tokens", "token_type"):
        if key not in meta:
            raise CheckpointError(f"{path}: no tokenizer.ggml.{key}; the file has no usable tokenizer")
    tokens, kinds = meta["tokens"], meta["token_type"]
    if len(tokens) != len(kinds):
        raise CheckpointError(f"{path}: {len(tokens)} tokenizer.ggml.tokens but {len(kinds)} token types")
    if meta["model"] == "gpt2":
        codec = _gguf_bpe(meta, tokens, kinds)
    elif meta["model"] == "llama":
        codec = _gguf_spm(path, meta, tokens, kinds)
    else:
        raise UnsupportedModel(f"{path}: tokenizer.ggml.model {meta['model']!r} is not supported; gpt2 and llama are")
    size = len(tokens)

    def declared(key: str) -> int | None:
        i = meta.get(f"{key}_token_id")
        if i is not None and not 0 <= i < size:
            raise CheckpointError(f"{path}: tokenizer.ggml.{key}_token_id is {i}, but there are {size} tokens")
        return i

    bos, eos = declared("bos"), declared("eos")
    codec.bos_id = bos
    by_text = {token.text: token.id for token in codec.added}
    ends = [eos, declared("eot"), declared("eom"), *(by_text.get(text) for text in _END_TEXTS)]
    codec.eos_ids = tuple(dict.fromkeys(i for i in ends if i is not None))
    codec.prefix_ids = [bos] if bos is not None and meta.get("add_bos_token", codec.prefix_ids != []) else []
    codec.suffix_ids = [eos] if eos is not None and meta.get("add_eos_token", False) else []
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    named = {name: tokens[i] for name, key in keys.items() if (i := declared(key)) is not None}
    templates = {"default": metadata["tokenizer.chat_template"]} if "tokenizer.chat_template" in metadata else {}
    for name in metadata.get("tokenizer.chat_templates", []):
        templates[name] = metadata.get(f"tokenizer.chat_template.{name}")
    return Tokenizer(codec, ChatTemplate(_checked(templates, path), named) if templates else None)


def _gguf_bpe(meta: dict[str, Any], tokens: list[str], kinds: list[int]) -> Codec:
    from model_core.tokenizer import bpe, spm

    added = [
        AddedToken(token, i, special=kind != spm.USER_DEFINED)
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (spm.UNKNOWN, spm.CONTROL, spm.USER_DEFINED)
    ]
    pre = meta.get("pre", "default")
    codec = bpe.byte_level_codec(tokens, meta.get("merges", []), added, pre)
    codec.prefix_ids = [meta["bos_token_id"]] if pre in bpe.ADD_BOS and "bos_token_id" in meta else []
    return codec


def _gguf_spm(path: Path, meta: dict[str, Any], tokens: list[str], kinds: list[int]) -> Codec:
    from model_core.tokenizer import spm

    # sentencepiece knows one unknown token; files with more (Phi-3) mean control tokens by the others.
    unknown = meta.get("unknown_token_id", next((i for i, kind in enumerate(kinds) if kind == spm.UNKNOWN), None))
    kinds = [spm.CONTROL if kind == spm.UNKNOWN else kind for kind in kinds]
    if unknown is not None and 0 <= unknown < len(kinds):
        kinds[unknown] = spm.UNKNOWN
    proto = spm.model_proto(spm.Vocabulary(
        pieces=tokens, scores=meta.get("scores", []), kinds=kinds,
        bos_id=meta.get("bos_token_id", -1), eos_id=meta.get("eos_token_id", -1),
        add_dummy_prefix=meta.get("add_space_prefix", True),
        remove_extra_whitespaces=meta.get("remove_extra_whitespaces", False),
        precompiled_charsmap=bytes(meta.get("precompiled_charsmap", b"")),
    ))
    return spm.sentencepiece_codec(proto, origin=str(path))


def _named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """bos_token and the like; older files hold {"content": ...} instead of the text."""
    found = {}
    for name in _NAMED:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise CheckpointError(f"{path}: larger than {_MAX_CONFIG_BYTES} bytes; that is no configuration file")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return found
