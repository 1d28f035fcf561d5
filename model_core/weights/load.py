"""A checkpoint into the storage the forward pass reads: every tensor straight into its rows of the fused weights."""

from __future__ import annotations

from itertools import chain

import torch

from model_core.errors import CheckpointError
from model_core.model.config import ModelConfig
from model_core.model.parameters import Parameters
from model_core.threads import over_threads
from model_core.weights import stream
from model_core.weights.checkpoint import Checkpoint, StoredTensor
from model_core.weights.progress import Progress

_HEAD = "lm_head.weight"
_EMBED = "model.embed_tokens.weight"
_SHOWN = 8


def load_parameters(checkpoint: Checkpoint, *, dtype: torch.dtype, device: str | torch.device,
                    progress: Progress | None = None) -> Parameters:
    """Read every tensor of `checkpoint`, converted to `dtype`, into fused Parameters on `device`.

    Names and shapes are compared before anything is read. Raises CheckpointError naming each tensor that is missing,
    unexpected or of the wrong shape, or a separate head in a checkpoint whose config ties it.
    """
    parameters = empty_parameters(checkpoint, dtype=dtype, device=device)
    fill(targets_of(checkpoint.config, parameters), checkpoint, progress)
    return parameters


def empty_parameters(checkpoint: Checkpoint, *, dtype: torch.dtype, device: str | torch.device) -> Parameters:
    """Storage for what `fill` reads. Raises CheckpointError as load_parameters does."""
    check_tensors(checkpoint)
    return Parameters.empty(checkpoint.config, dtype=dtype, device=device)


def fill(targets: dict[str, torch.Tensor], checkpoint: Checkpoint, progress: Progress | None = None, *,
         streamed: bool | None = None) -> None:  # fmt: skip
    """Read the tensors of a checkpoint that passed `check_tensors` into `targets_of` its Parameters, converted to their dtype.

    streamed: by weights/stream.py what lies in files as it is wanted; None is on a GPU only, for a CPU reads the mapped file.
    """
    device = targets[_EMBED].device
    if streamed is None:
        streamed = device.type != "cpu"
    if progress:
        progress.begin(f"loading {checkpoint.path.name}", checkpoint.nbytes)

    def read(stored: StoredTensor) -> int:
        if stored.name in targets:
            stored.read_into(targets[stored.name])
        return stored.nbytes

    spans: list[StoredTensor] = []
    others: list[StoredTensor] = []
    for stored in checkpoint.tensors.values():
        one_by_one = stored.span is None or stored.name not in targets or not (streamed and stream.AVAILABLE)
        (others if one_by_one else spans).append(stored)
    moved = stream.stream([(stored, targets[stored.name]) for stored in spans], device) if spans else ()
    for nbytes in chain(moved, over_threads(read, others, None if device.type == "cpu" else 1)):
        if progress:
            progress.advance(nbytes)
    if checkpoint.config.tie_embeddings and _HEAD in checkpoint.tensors:
        _check_tied(checkpoint, targets[_EMBED])
    if progress:
        progress.end()


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every tensor that a checkpoint of this config must hold."""
    parameters = Parameters.empty(config, dtype=torch.float32, device="meta")
    return {name: tuple(target.shape) for name, target in targets_of(config, parameters).items()}


def targets_of(config: ModelConfig, parameters: Parameters) -> dict[str, torch.Tensor]:
    """Hugging Face name -> the rows of the fused storage that it fills."""
    targets = {_EMBED: parameters.embed, "model.norm.weight": parameters.final_norm}
    if not config.tie_embeddings:
        targets[_HEAD] = parameters.head
    rows = (config.q_size, config.kv_size, config.kv_size)
    for index, layer in enumerate(parameters.layers):
        prefix = f"model.layers.{index}."
        gate, up = layer.gate_up.chunk(2)
        named = {
            "input_layernorm.weight": layer.attn_norm,
            "self_attn.o_proj.weight": layer.o,
            "post_attention_layernorm.weight": layer.mlp_norm,
            "mlp.gate_proj.weight": gate,
            "mlp.up_proj.weight": up,
            "mlp.down_proj.weight": layer.down,
            "self_attn.q_norm.weight": layer.q_norm,
            "self_attn.k_norm.weight": layer.k_norm,
        }
        for part, weight in zip("qkv", layer.qkv.split(rows), strict=True):
            named[f"self_attn.{part}_proj.weight"] = weight
        if layer.qkv_bias is not None:
            for part, bias in zip("qkv", layer.qkv_bias.split(rows), strict=True):
                named[f"self_attn.{part}_proj.bias"] = bias
        targets.update((prefix + name, target) for name, target in named.items() if target is not None)
    return targets


def _ignored(name: str, config: ModelConfig) -> bool:
    # Old exports carry the rotary frequencies, which follow from the config; a tied head is compared after loading.
    return name.endswith("rotary_emb.inv_freq") or (name == _HEAD and config.tie_embeddings)


def check_tensors(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless the checkpoint's headers promise exactly the tensors of its config."""
    found, config = checkpoint.tensors, checkpoint.config
    if config.num_layers > len(found):
        raise CheckpointError(f"{checkpoint.path}: the config has {config.num_layers} layers, but there are only "
                              f"{len(found)} tensors. Check that config.json belongs to these files")
    try:
        wanted = expected_shapes(config)
    except (RuntimeError, TypeError) as error:  # sizes that torch cannot count
        raise CheckpointError(f"{checkpoint.path}: a size of the config is impossible ({error})") from None
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted and not _ignored(name, config)]
    wrong = [f"{name} is {list(found[name].shape)}, config says {list(shape)}"
             for name, shape in wanted.items() if name in found and found[name].shape != shape]
    groups = {"missing": missing, "unexpected": unexpected, "of the wrong shape": wrong}
    faults = [f"{len(names)} {what}: {'; '.join(names[:_SHOWN])}{' ...' if len(names) > _SHOWN else ''}"
              for what, names in groups.items() if names]
    if faults:
        raise CheckpointError(f"{checkpoint.path}: the tensors do not fit the {config.family} config. "
                              f"{'. '.join(faults)}. Check that config.json belongs to these files")


def _check_tied(checkpoint: Checkpoint, embed: torch.Tensor) -> None:
    head = torch.empty_like(embed)
    stored = checkpoint.tensors[_HEAD]
    if stored.shape == tuple(head.shape):
        stored.read_into(head)
        if torch.equal(head, embed):
            return
    raise CheckpointError(f"{checkpoint.path}: config ties {_HEAD!r} to {_EMBED!r}, but the checkpoint holds another "
                          f"{_HEAD!r}; set tie_word_embeddings to false in config.json if that head is meant")
