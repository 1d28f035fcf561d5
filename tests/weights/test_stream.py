"""Weights through staging buffers: the same bits as from the mapped file, wherever chunks end; errors name the file. The pinned
buffers and the side stream of a GPU are ordinary memory and no stream here, but for the test that needs one."""

from __future__ import annotations

import json
import os
import struct
import threading
import time
from pathlib import Path

import pytest
import torch

from model_core.errors import CheckpointError
from model_core.model.parameters import Parameters
from model_core.weights import stream
from model_core.weights.checkpoint import Span, StoredTensor, open_checkpoint
from model_core.weights.load import fill, load_parameters, targets_of
from model_core.weights.progress import SilentProgress

SHAPES = [(300, 72), (72,), (7, 5), (1,), (1000,), (33, 112)]


@pytest.fixture
def make(sample):
    return lambda family="llama", **changes: sample(family, **{"hidden_size": 72, "intermediate_size": 112, **changes})


class Counted(SilentProgress):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[int] = []

    def advance(self, nbytes: int) -> None:
        self.parts.append(nbytes)


def streamed(path: Path, dtype: torch.dtype, progress: SilentProgress | None = None) -> Parameters:
    checkpoint = open_checkpoint(path)
    parameters = Parameters.empty(checkpoint.config, dtype=dtype, device="cpu")
    for tensor in parameters.tensors():
        tensor.fill_(float("nan"))  # so that what is not written is seen
    fill(targets_of(checkpoint.config, parameters), checkpoint, progress, streamed=True)
    return parameters


def differing(one: Parameters, other: Parameters) -> list[tuple[int, ...]]:
    pairs = zip(one.tensors(), other.tensors(), strict=True)
    return [tuple(a.shape) for a, b in pairs if a.dtype != b.dtype or not torch.equal(a, b)]


def raw(folder: Path, tensors: list[torch.Tensor], gap: int = 0, name: str = "data") -> list[StoredTensor]:
    """The tensors in a file, `gap` bytes before each."""
    found, data = [], b""
    for number, tensor in enumerate(tensors):
        data += b"\xff" * gap
        span = Span(folder / name, len(data), tensor.dtype)
        found.append(StoredTensor(f"t{number}", tuple(tensor.shape), tensor.nbytes, lambda target: None, span))
        data += tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    (folder / name).write_bytes(data)
    return found


@pytest.mark.parametrize("chunk", [16, 100, 1000, 4096, 1 << 20])
@pytest.mark.parametrize("readers", [1, 3])
def test_wherever_chunks_end_the_bits_are_the_mapped_files(make, chunk, readers, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK", chunk)
    monkeypatch.setattr(stream, "READERS", readers)
    folder = make("qwen2", hidden_size=36, intermediate_size=20, vocab_size=50).save(tmp_path)
    wanted = load_parameters(open_checkpoint(folder), dtype=torch.float32, device="cpu")
    assert differing(streamed(folder, torch.float32), wanted) == []


@pytest.mark.parametrize("family", ["llama", "llama_tied", "mistral", "qwen3"])
def test_every_family_is_fused_as_before(make, family, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK", 5000)
    folder = make(family).save(tmp_path)
    wanted = load_parameters(open_checkpoint(folder), dtype=torch.bfloat16, device="cpu")
    assert differing(streamed(folder, torch.bfloat16), wanted) == []


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loaded", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes_are_converted(make, stored, loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK", 3000)
    model = make("qwen2")
    model.tensors = {name: tensor.to(stored) for name, tensor in model.tensors.items()}
    folder = model.save(tmp_path)
    wanted = load_parameters(open_checkpoint(folder), dtype=loaded, device="cpu")
    assert differing(streamed(folder, loaded), wanted) == []


@pytest.mark.parametrize("gap", [0, 1, 3, 8])
def test_tensors_that_lie_at_odd_bytes(gap, tmp_path, monkeypatch):
    """The format allows them; buffers are aligned all the same."""
    monkeypatch.setattr(stream, "CHUNK", 1000)
    generator = torch.Generator().manual_seed(gap)
    dtypes = [torch.float16, torch.float64, torch.float32, torch.bfloat16]
    tensors = [torch.randn(shape, generator=generator).to(dtypes[n % 4]) for n, shape in enumerate(SHAPES)]
    stored = raw(tmp_path, tensors, gap)
    targets = [torch.full_like(tensor, float("nan")) for tensor in tensors]
    list(stream.stream(list(zip(stored, targets, strict=True))[::-1], torch.device("cpu")))
    assert all(torch.equal(a, b) for a, b in zip(tensors, targets, strict=True))


@pytest.mark.parametrize("capacity", [8, 64, 1000, 1 << 16])
def test_chunks_hold_everything_once_and_in_the_files_order(capacity, tmp_path):
    tensors = [torch.zeros(shape, dtype=torch.float64 if n % 2 else torch.float16) for n, shape in enumerate(SHAPES)]
    stored = [*raw(tmp_path, tensors, 2, "a"), *raw(tmp_path, tensors, 0, "b")]
    wanted = list(zip(stored, [torch.empty_like(one) for one in tensors] * 2, strict=True))
    chunks = stream.chunks_of(wanted[::-1], capacity)
    pieces = [piece for chunk in chunks for piece in chunk]
    assert [(piece.path, piece.offset) for piece in pieces] == sorted((piece.path, piece.offset) for piece in pieces)
    assert sum(piece.nbytes for piece in pieces) == sum(one.nbytes for one in stored)
    for chunk in chunks:
        assert chunk and all(piece.at % piece.dtype.itemsize == 0 and len(piece.target) for piece in chunk)
        ends = [0, *(piece.at + piece.nbytes for piece in chunk)]
        assert all(piece.at >= end for piece, end in zip(chunk, ends, strict=False)) and ends[-1] <= capacity
    for tensor in stored:  # without holes
        at = tensor.span.offset
        for piece in pieces:
            if (piece.path, piece.name) == (tensor.span.path, tensor.name):
                assert piece.offset == at
                at += piece.nbytes
        assert at == tensor.span.offset + tensor.nbytes


def test_memory_is_two_buffers_a_thread_whatever_the_size(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK", 256)
    monkeypatch.setattr(stream, "READERS", 3)
    made: list[stream._Staging] = []
    init = stream._Staging.__init__
    monkeypatch.setattr(stream._Staging, "__init__", lambda self, copies: (made.append(self), init(self, copies))[1])
    tensor = torch.arange(100_000, dtype=torch.float32)
    target = torch.empty_like(tensor)
    parts = list(stream.stream(zip(raw(tmp_path, [tensor]), [target], strict=True), torch.device("cpu")))
    assert torch.equal(target, tensor) and len(parts) == -(-tensor.nbytes // 256)
    assert 1 <= len(made) <= 3 and all(len(buffer) == 256 for one in made for buffer in one._buffers)


def test_progress_advances_chunk_by_chunk_to_the_bytes_on_disk(make, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK", 4096)
    model = make("llama_tied")
    model.tensors["lm_head.weight"] = model.tensors["model.embed_tokens.weight"].clone()  # compared, not streamed
    folder, progress = model.save(tmp_path), Counted()
    streamed(folder, torch.float32, progress)
    assert sum(progress.parts) == open_checkpoint(folder).nbytes
    head = model.tensors["lm_head.weight"].nbytes
    assert head in progress.parts and len(progress.parts) > (sum(progress.parts) - head) // 4096


def test_a_tied_head_that_differs_is_refused_as_before(make, tmp_path):
    model = make("llama_tied")
    model.tensors["lm_head.weight"] = model.tensors["model.embed_tokens.weight"] + 1
    folder = model.save(tmp_path)
    with pytest.raises(CheckpointError, match="config ties 'lm_head.weight'"):
        streamed(folder, torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("chunk", [1000, 1 << 16, 4 << 20])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_the_bits_are_the_mapped_files_though_others_compute(make, stored, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK", chunk)
    model = make("qwen2", hidden_size=720, intermediate_size=2000, vocab_size=5000)
    model.tensors = {name: tensor.to(stored) for name, tensor in model.tensors.items()}
    checkpoint = open_checkpoint(model.save(tmp_path))
    wanted = load_parameters(checkpoint, dtype=torch.bfloat16, device="cpu")
    found = Parameters.empty(checkpoint.config, dtype=torch.bfloat16, device="cuda")
    for tensor in found.tensors():
        tensor.zero_()
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):  # copies on the side stream must not wait for the default one, nor it for them
        busy = busy @ busy
    fill(targets_of(checkpoint.config, found), checkpoint)
    assert [tuple(a.shape) for a, b in zip(found.tensors(), wanted.tensors(), strict=True) if not torch.equal(a.cpu(), b)] == []


# --- errors


def test_a_file_cut_short_after_it_was_opened_is_named(make, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK", 4096)
    folder = make().save(tmp_path)
    checkpoint = open_checkpoint(folder)
    parameters = Parameters.empty(checkpoint.config, dtype=torch.float32, device="cpu")
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=rf"{file} is truncated: it ends at byte {file.stat().st_size}, within tensor "
                                              r"'\S+'; fetch the file again"):
        fill(targets_of(checkpoint.config, parameters), checkpoint, streamed=True)
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{file} cannot be read: No such file"):
        fill(targets_of(checkpoint.config, parameters), checkpoint, streamed=True)


def test_an_error_of_a_reader_comes_out_and_its_threads_end(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK", 64)
    monkeypatch.setattr(stream, "READERS", 4)
    reads = []

    def broken(file: int, views: list[memoryview], offset: int) -> int:
        reads.append(offset)
        if offset == 6400:
            raise OSError(5, "Input/output error")
        time.sleep(0.001)
        return original(file, views, offset)

    original = os.preadv
    monkeypatch.setattr(os, "preadv", broken)
    tensor = torch.zeros(100_000)
    stored = raw(tmp_path, [tensor])
    before = threading.active_count()
    with pytest.raises(CheckpointError, match=rf"{tmp_path / 'data'} cannot be read at byte \d+: Input/output error"):
        list(stream.stream([(stored[0], torch.empty_like(tensor))], torch.device("cpu")))
    assert threading.active_count() == before
    assert len(reads) < 6250 // 2  # of 6250 chunks: those that waited were given up


def test_short_reads_are_continued(tmp_path, monkeypatch):
    original = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, offset: original(file, [views[0][:7]], offset))
    tensor = torch.randn(1001)
    target = torch.empty_like(tensor)
    list(stream.stream(zip(raw(tmp_path, [tensor]), [target], strict=True), torch.device("cpu")))
    assert torch.equal(target, tensor)


def test_spans_are_where_the_format_says(make, tmp_path):
    """Against the header read here, by the format's description."""
    file = make("qwen3").save(tmp_path) / "model.safetensors"
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    for name, stored in open_checkpoint(tmp_path).tensors.items():
        begin, end = header[name]["data_offsets"]
        assert (stored.span.path, stored.span.offset, stored.nbytes) == (file, 8 + size + begin, end - begin)
