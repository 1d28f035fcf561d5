"""A model folder of seeded random weights in a real model's shape: speed does not depend on what the weights say.

    python -m benchmarks.random_model tinyllama-1.1b weight/random-tinyllama-1.1b

Writes config.json, model.safetensors and a tokenizer in which every id has a text.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from model_core.model.config import ModelConfig
from model_core.model.parameters import Parameters

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(
        hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, max_position_embeddings=512,
    ),
    "tinyllama-1.1b": dict(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
        vocab_size=32000, max_position_embeddings=2048,
    ),
    "llama-2-7b": dict(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
        vocab_size=32000, max_position_embeddings=4096,
    ),
    "llama-3-8b": dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=8192, rope_theta=500000.0,
    ),
}  # fmt: skip

_TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}assistant: "


def hf_config(shape: str) -> dict[str, Any]:
    """config.json of this shape, as Hugging Face writes it. No end-of-sequence id: answers run to max_tokens."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "bos_token_id": 1, "torch_dtype": "bfloat16", "rope_theta": 10000.0,
        **SHAPES[shape],
    }  # fmt: skip


def write_model(shape: str, folder: Path, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0,
                device: str = "cpu") -> Path:  # fmt: skip
    """Write the model of `shape` into `folder`; weights are normal with standard deviation 0.02, norms are 1."""
    from safetensors.torch import save_file

    from model_core.weights.load import expected_shapes

    folder.mkdir(parents=True, exist_ok=True)
    config = hf_config(shape)
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for name, size in expected_shapes(ModelConfig.from_hf(config)).items():
        if name.endswith("norm.weight"):
            tensors[name] = torch.ones(size, dtype=dtype)
        else:
            values = torch.empty(size, dtype=dtype, device=device).normal_(0.0, 0.02, generator=generator)
            tensors[name] = values.cpu()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _write_tokenizer(folder, config["vocab_size"])
    return folder


def random_parameters(config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str) -> Parameters:
    """Weights of a model's shape that never were in a file: normal with standard deviation 0.02, seed 0; norms 1."""
    generator = torch.Generator(device).manual_seed(0)
    parameters = Parameters.empty(config, dtype=dtype, device=device)
    for tensor in parameters.tensors():
        if tensor.dim() == 1:
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, 0.02, generator=generator)
    return parameters


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Byte-level BPE without merges: 256 bytes, and words that no text contains, so that every id has a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"\u0120w{number}" for number in range(vocab_size - len(symbols))]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols + words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": _TEMPLATE}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    folder = write_model(options.shape, options.folder, seed=options.seed, device=options.device)
    print(f"{options.shape}: {sum(f.stat().st_size for f in folder.iterdir()) / 1e9:.2f} GB in {folder}")


if __name__ == "__main__":
    main()
