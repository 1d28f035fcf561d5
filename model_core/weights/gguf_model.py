"""What a GGUF file says about its model: the config from its metadata, and llama.cpp's tensor names and row order.

Source: the GGUF specification's metadata keys; names and the q/k row permutation as llama.cpp's converter writes them.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from model_core.errors import CheckpointError, UnsupportedModel
from model_core.model.config import Family, ModelConfig, RopeScaling
from model_core.weights.gguf_file import GGUFFile

# Mistral files say "llama".
_FAMILIES: dict[str, Family] = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_ROPE_FACTORS = "rope_freqs.weight"
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def hf_name(name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor; None for what is not a weight; an unknown name comes back unchanged."""
    if name == _ROPE_FACTORS:
        return None
    if match := _LAYER_NAME.fullmatch(name):
        index, part, kind = match.groups()
        if part in _LAYER:
            return f"model.layers.{index}.{_LAYER[part]}.{kind}"
    stem, _, kind = name.rpartition(".")
    return f"{_TOP[stem]}.{kind}" if stem in _TOP else name


def permuted_heads(name: str, config: ModelConfig, architecture: str) -> int:
    """How many heads of llama.cpp's interleaved row order the tensor (HF name) holds; 0 if its rows are in HF order.

    llama.cpp's converter reorders q and k for its rotation of adjacent pairs, but only for architecture "llama".
    """
    if architecture != "llama":
        return 0
    if name.endswith("self_attn.q_proj.weight"):
        return config.num_heads
    return config.num_kv_heads if name.endswith("self_attn.k_proj.weight") else 0


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    """The model's shapes and constants.

    Raises UnsupportedModel for what this engine would compute wrongly, CheckpointError for absent keys.
    """
    meta = file.metadata
    architecture = meta.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _FAMILIES:
        raise UnsupportedModel(f"{file.path.name}: GGUF architecture {architecture!r} is not supported; "
                               f"supported: {', '.join(sorted(_FAMILIES))}")

    def optional(key: str, default: Any = None) -> Any:
        return meta.get(f"{architecture}.{key}", default)

    def required(key: str) -> Any:
        value = optional(key)
        if value is None:
            raise CheckpointError(f"{file.path.name} has no metadata key '{architecture}.{key}'")
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise UnsupportedModel(f"{file.path.name}: '{architecture}.{key}' differs from layer to layer")
            value = value[0]
        return value

    if optional("expert_count", 0):
        raise UnsupportedModel(f"{file.path.name}: '{architecture}.expert_count' is {optional('expert_count')}; "
                               "only dense models run")
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path.name} has no 'token_embd.weight': a vocabulary or a part of a split file")
    heads, hidden = required("attention.head_count"), required("embedding_length")
    head_dim = optional("attention.key_length") or hidden // heads
    rotated = optional("rope.dimension_count", head_dim)
    if rotated != head_dim or optional("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModel(f"{file.path.name}: rotary dimensions {rotated}, value length "
                               f"{optional('attention.value_length', head_dim)} and head size {head_dim} must be equal")
    theta = float(optional("rope.freq_base", 10000.0))
    family = _FAMILIES[architecture]
    return ModelConfig(
        family=family,
        num_layers=required("block_count"),
        hidden_size=hidden,
        intermediate_size=required("feed_forward_length"),
        num_heads=heads,
        num_kv_heads=required("attention.head_count_kv") if optional("attention.head_count_kv") else heads,
        head_dim=head_dim,
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        context_length=required("context_length"),
        rms_eps=required("attention.layer_norm_rms_epsilon"),
        rope_theta=theta,
        rope_scaling=_rope_scaling(file, architecture, theta, head_dim),
        tie_embeddings="output.weight" not in file.tensors,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        sliding_window=optional("attention.sliding_window") or None,
        eos_ids=_eos_ids(meta),
        bos_id=meta.get("tokenizer.ggml.bos_token_id"),
    )


def _eos_ids(meta: dict[str, Any]) -> tuple[int, ...]:
    # End of text, of turn and of message: whichever the file names, each once.
    ids = [meta.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    return tuple(dict.fromkeys(token for token in ids if token is not None))


def _rope_scaling(file: GGUFFile, architecture: str, theta: float, head_dim: int) -> RopeScaling:
    meta = file.metadata
    kind = meta.get(f"{architecture}.rope.scaling.type", "none")
    # Files from before the "scaling" keys say only this.
    factor = float(meta.get(f"{architecture}.rope.scaling.factor", meta.get(f"{architecture}.rope.scale_linear", 1.0)))
    if kind not in ("none", "linear", "llama3"):
        raise UnsupportedModel(f"{file.path.name}: rope scaling {kind!r} is not supported; use none, linear or llama3")
    if _ROPE_FACTORS in file.tensors:
        return _llama3_scaling(file, theta, head_dim)
    if kind == "llama3":
        raise CheckpointError(f"{file.path.name}: rope scaling is llama3 but tensor {_ROPE_FACTORS!r} is missing")
    linear = factor != 1.0 and kind in ("linear", "none")
    return RopeScaling(kind="linear", factor=factor) if linear else RopeScaling()


def _llama3_scaling(file: GGUFFile, theta: float, head_dim: int) -> RopeScaling:
    """Recover Llama 3's four numbers from the per-frequency factors that llama.cpp stores instead of them.

    The largest factor is `factor`; the blend's bounds are those of every released model (1, 4, 8192), and the result is
    recomputed and compared, so another rule is refused rather than misread.
    """
    tensor = file.tensors[_ROPE_FACTORS]
    if tensor.type != "F32" or tensor.shape != (head_dim // 2,):
        raise UnsupportedModel(f"{file.path.name}: {_ROPE_FACTORS!r} must be F32 of {head_dim // 2} factors, "
                               f"is {tensor.type} of shape {tensor.shape}")
    stored = file.raw(tensor).view(np.float32).astype(np.float64)
    if np.all(stored == 1.0):
        return RopeScaling()
    guess = RopeScaling(kind="llama3", factor=round(float(stored.max()), 4), low_freq_factor=1.0, high_freq_factor=4.0,
                        original_context=8192)
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (guess.original_context / wavelength - guess.low_freq_factor) / (
        guess.high_freq_factor - guess.low_freq_factor)
    blended = 1.0 / ((1 - smooth) / guess.factor + smooth)
    expected = np.where(smooth < 0, guess.factor, np.where(smooth > 1, 1.0, blended))
    if not np.allclose(stored, expected, rtol=1e-3):
        worst = int(np.argmax(np.abs(stored / expected - 1)))
        raise UnsupportedModel(f"{file.path.name}: {_ROPE_FACTORS!r} is not Llama 3's scaling by {guess.factor:g}: "
                               f"entry {worst} is {stored[worst]:g}, not {expected[worst]:g}; load safetensors instead")
    return guess
