"""An opened checkpoint: its config, and its tensors one at a time under their Hugging Face names."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from model_core.errors import CheckpointError, UnsupportedModel
from model_core.model.config import ModelConfig
from model_core.weights.dequantise import dequantise_into
from model_core.weights.gguf_file import GGUFFile, GGUFTensor
from model_core.weights.gguf_model import config_from_gguf, hf_name, permuted_heads

INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_JSON = 64 << 20


@dataclass(frozen=True)
class Span:
    """Where a tensor's elements lie in a file: row-major, one after the other, beginning at byte `offset`."""

    path: Path
    offset: int
    dtype: torch.dtype


@dataclass(frozen=True)
class StoredTensor:
    """One tensor on disk; `read_into` fills a tensor of the same shape, converting dtype and device.

    span: where its elements can be read by oneself; None if they must be put in order or dequantised first.
    """

    name: str
    shape: tuple[int, ...]
    nbytes: int  # on disk
    read_into: Callable[[torch.Tensor], None]
    span: Span | None = None


@dataclass(frozen=True)
class Checkpoint:
    """Weights on disk that were opened but not read. `tensors` has Hugging Face names, llama.cpp's row order undone."""

    path: Path
    config: ModelConfig
    format: Literal["safetensors", "gguf"]
    tensors: dict[str, StoredTensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a folder of safetensors (with config.json), a folder with one GGUF file, or a GGUF file.

    Only headers are read. Raises CheckpointError for what is missing or damaged and UnsupportedModel for what this
    engine does not run, pickle files included: unpickling executes whatever code they hold.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix == ".gguf":
            return _open_gguf(path)
        raise UnsupportedModel(f"{path} is not a *.gguf file; give one, or a folder of safetensors and config.json")
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; give a model folder or a .gguf file")
    files = sorted(entry for entry in path.iterdir() if entry.is_file())
    if any(file.suffix == ".safetensors" for file in files):
        return _open_safetensors(path)
    ggufs = [file for file in files if file.suffix == ".gguf"]
    if len(ggufs) == 1:
        return _open_gguf(ggufs[0])
    if ggufs:
        names = ", ".join(file.name for file in ggufs[:4])
        raise CheckpointError(f"{path} holds {len(ggufs)} GGUF files ({names}); give the path of the one to load")
    pickles = [file.name for file in files if file.suffix in _PICKLES]
    if pickles:
        raise UnsupportedModel(f"{path} holds only pickle files ({', '.join(pickles[:4])}): they can run code when "
                               "opened and are refused; use a safetensors or GGUF version of the model")
    raise CheckpointError(f"{path} holds no *.safetensors and no *.gguf file")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 64 MiB; CheckpointError names the file if it is not one."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise CheckpointError(f"{path} is larger than {_MAX_JSON >> 20} MiB; not a model's JSON file")
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return found


def _checked(read: Callable[[], ModelConfig], origin: str) -> ModelConfig:
    """What `read` makes of JSON or metadata, which may hold anything: a value of the wrong kind is a CheckpointError."""
    try:
        config = read()
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{origin} holds a value of the wrong kind: {error}") from None
    window = 1 if config.sliding_window is None else config.sliding_window
    positive = {"rms_eps": config.rms_eps, "rope_theta": config.rope_theta, "sliding_window": window}
    ids = [("bos", config.bos_id or 0), *(("eos", value) for value in config.eos_ids)]
    faults = [f"{name} {value!r}" for name, value in positive.items() if type(value) not in (int, float) or not value > 0]
    faults += [f"{name} token id {value!r}" for name, value in ids if type(value) is not int]
    if faults:
        raise CheckpointError(f"{origin} holds a value of the wrong kind: {', '.join(faults)}")
    return config


def _open_gguf(path: Path) -> Checkpoint:
    file = GGUFFile(path)
    config = _checked(lambda: config_from_gguf(file), f"{path}: the metadata")
    architecture = file.metadata["general.architecture"]
    tensors = {}
    for stored in file.tensors.values():
        name = hf_name(stored.name)
        if name is not None:
            heads = permuted_heads(name, config, architecture)
            tensors[name] = StoredTensor(name, stored.shape, stored.nbytes, _gguf_reader(file, stored, heads))
    return Checkpoint(path, config, "gguf", tensors)


def _gguf_reader(file: GGUFFile, stored: GGUFTensor, heads: int) -> Callable[[torch.Tensor], None]:
    def read_into(target: torch.Tensor) -> None:
        raw = file.raw(stored)
        if heads:
            # Rows are whole, so the order can be undone on the quantised bytes: [heads, half, 2] -> [heads, 2, half].
            raw = raw.reshape(heads, -1, 2, raw.shape[-1]).swapaxes(1, 2).reshape(raw.shape)
        dequantise_into(target, raw, stored.type)

    return read_into


def _open_safetensors(folder: Path) -> Checkpoint:
    spec = read_json(folder / "config.json")
    config = _checked(lambda: ModelConfig.from_hf(spec), str(folder / "config.json"))
    generation = folder / "generation_config.json"
    if generation.is_file():
        # Llama 3 and Qwen name the end-of-turn token only here.
        more = read_json(generation).get("eos_token_id")
        ids = config.eos_ids + tuple(more if isinstance(more, list) else () if more is None else (more,))
        config = _checked(lambda: replace(config, eos_ids=tuple(dict.fromkeys(ids))), str(generation))
    tensors: dict[str, StoredTensor] = {}
    for file in _shards(folder):
        for stored in _read_header(file):
            name = _canonical(stored.name)
            if name in tensors:
                raise CheckpointError(f"tensor {name!r} is in {file.name} and in another file of {folder}")
            tensors[name] = replace(stored, name=name)
    if (folder / INDEX).is_file():
        listed = {_canonical(name) for name in read_json(folder / INDEX)["weight_map"]}
        absent = sorted(listed - tensors.keys())
        if absent:
            raise CheckpointError(f"{INDEX} lists {len(absent)} tensors that no file holds, first {absent[0]!r}")
    return Checkpoint(folder, config, "safetensors", tensors)


def _canonical(name: str) -> str:
    """The name with "model." in front, which base-model exports leave out."""
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


def _shards(folder: Path) -> list[Path]:
    """The files to read: those of the index, else model.safetensors, else every *.safetensors."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{folder / INDEX} has no 'weight_map' of tensor name to file name")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(f"{folder / INDEX} names {name!r}, which is not a file of this folder")
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder} lacks {name}, which {INDEX} lists; fetch the model again")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def _read_header(file: Path) -> list[StoredTensor]:
    try:
        opened = safe_open(file, framework="pt", device="cpu")  # compares all offsets with the file's length
        starts = _data_offsets(file)
        found = []
        for name in opened.keys():  # noqa: SIM118 (not a dict)
            view = opened.get_slice(name)
            kind, shape = view.get_dtype(), tuple(view.get_shape())
            if kind not in _FLOATS:
                raise UnsupportedModel(f"{file.name}: tensor {name!r} is {kind}; only {', '.join(_FLOATS)} are read")
            span = Span(file, starts[name], _FLOATS[kind])
            nbytes = math.prod(shape) * span.dtype.itemsize
            found.append(StoredTensor(name, shape, nbytes, _safetensors_reader(opened, name), span))
        return found
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or damaged ({error}); fetch the file again") from None


def _data_offsets(file: Path) -> dict[str, int]:
    """Byte of the file at which each tensor begins; the safetensors library does not tell."""
    with file.open("rb") as opened:
        (size,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(size))
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _safetensors_reader(opened: Any, name: str) -> Callable[[torch.Tensor], None]:
    def read_into(target: torch.Tensor) -> None:
        target.copy_(opened.get_tensor(name))  # a view of the mapped file: no second copy in memory

    return read_into
