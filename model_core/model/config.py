"""The Llama family as data: everything the forward pass needs to know about a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from model_core.errors import UnsupportedModel

Family = Literal["llama", "mistral", "qwen2", "qwen3"]

_FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    kind "linear" divides every frequency by `factor` (Chen et al. 2023, arXiv 2306.15595). kind "llama3" keeps short
    wavelengths, divides long ones by `factor` and blends between (Llama 3.1 release).
    """

    kind: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of one Llama-family model. Sizes in elements, `context_length` in tokens."""

    family: Family
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    rms_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim",
                     "vocab_size", "context_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or value <= 0:
                raise UnsupportedModel(f"{name} must be a positive integer, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedModel(
                f"num_attention_heads {self.num_heads} is not a multiple of num_key_value_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise UnsupportedModel(f"head_dim {self.head_dim} must be even for rotary embedding")

    @property
    def q_size(self) -> int:
        """Elements of all query heads of one token."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of all key (or value) heads of one token."""
        return self.num_kv_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Parameters held in memory; a tied head is counted once."""
        layer = (self.q_size + 2 * self.kv_size) * self.hidden_size + self.hidden_size * self.q_size
        layer += 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        layer += (self.q_size + 2 * self.kv_size if self.qkv_bias else 0) + (2 * self.head_dim if self.qk_norm else 0)
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes of keys and values that one token occupies over all layers."""
        return 2 * self.num_layers * self.kv_size * element_bytes

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> ModelConfig:
        """Read a Hugging Face config.json.

        Raises UnsupportedModel, naming the key, for anything this engine would compute wrongly.
        """
        names = config.get("architectures") or []
        family = next((_FAMILIES[name] for name in names if name in _FAMILIES), None)
        if family is None:
            raise UnsupportedModel(f"architecture {names or config.get('model_type')!r} is not supported; "
                                   f"supported: {', '.join(sorted(_FAMILIES))}")
        if config.get("hidden_act", "silu") not in ("silu", "swish"):
            raise UnsupportedModel(f"hidden_act {config['hidden_act']!r} is not supported; only silu")
        if config.get("mlp_bias"):
            raise UnsupportedModel("mlp_bias is true; MLP biases are not supported")
        if config.get("quantization_config"):
            raise UnsupportedModel("quantization_config is set; load the unquantised checkpoint or a GGUF file")
        if family in ("llama", "mistral") and config.get("attention_bias"):
            raise UnsupportedModel("attention_bias is true for this architecture; an output bias is not supported")
        try:
            heads = config["num_attention_heads"]
            hidden = config["hidden_size"]
            eos = config.get("eos_token_id")
            windowed = config.get("use_sliding_window", family == "mistral")
            return cls(
                family=family,
                num_layers=config["num_hidden_layers"],
                hidden_size=hidden,
                intermediate_size=config["intermediate_size"],
                num_heads=heads,
                num_kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or hidden // heads,
                vocab_size=config["vocab_size"],
                context_length=config.get("max_position_embeddings", 2048),
                rms_eps=config.get("rms_norm_eps", 1e-6),
                rope_theta=_rope_theta(config),
                rope_scaling=_rope_scaling(config),
                tie_embeddings=bool(config.get("tie_word_embeddings", False)),
                qkv_bias=family == "qwen2",
                qk_norm=family == "qwen3",
                sliding_window=config.get("sliding_window") if windowed else None,
                eos_ids=tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,)),
                bos_id=config.get("bos_token_id"),
            )
        except KeyError as missing:
            raise UnsupportedModel(f"config.json has no key {missing}") from None


def _rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    # transformers 5 writes "rope_parameters" with rope_theta inside; 4 wrote "rope_scaling" beside "rope_theta".
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _rope_theta(config: dict[str, Any]) -> float:
    return float(_rope_parameters(config).get("rope_theta") or config.get("rope_theta") or 10000.0)


def _rope_scaling(config: dict[str, Any]) -> RopeScaling:
    spec = _rope_parameters(config)
    kind = spec.get("rope_type") or spec.get("type") or "default"
    if kind == "default":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling(kind="linear", factor=float(spec["factor"]))
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=float(spec["factor"]),
            low_freq_factor=float(spec["low_freq_factor"]),
            high_freq_factor=float(spec["high_freq_factor"]),
            original_context=int(spec["original_max_position_embeddings"]),
        )
    raise UnsupportedModel(f"rope_scaling type {kind!r} is not supported; supported: default, linear, llama3")
