"""A model hub on 127.0.0.1 that the real huggingface_hub client accepts, with faults to order; small checkpoints."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Hub:
    """repos: "org/name" -> {file: bytes}. The other fields are faults and the log."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    status: int | None = None  # answer every request with this
    error_code: str | None = None
    cut_after: int | None = None  # the next GET of a weight file sends this many bytes, then the connection is closed
    served: dict[str, bytes] = field(default_factory=dict)  # file -> what is sent instead of what is listed
    ignore_range: bool = False
    hide_digests: bool = False  # the listing has no sizes, as some mirrors'
    delay_s: float = 0.0
    log: list[tuple[str, str, str | None]] = field(default_factory=list)  # (method, path, Range)
    url: str = ""

    def gets(self, name: str = "") -> list[str | None]:
        """The Range header of every GET of a file whose path ends in `name`."""
        return [span for method, path, span in self.log
                if method == "GET" and "/resolve/" in path and path.endswith(name)]

    def listing(self, repo: str) -> dict:
        siblings = []
        for name, content in self.repos[repo].items():
            entry: dict = {"rfilename": name}
            if not self.hide_digests:
                entry |= {"size": len(content), "blobId": _blob_id(content)}
                if name.endswith((".safetensors", ".gguf", ".bin")):
                    sha256 = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"size": len(content), "sha256": sha256, "pointerSize": 130}
            siblings.append(entry)
        return {"id": repo, "sha": COMMIT, "private": False, "siblings": siblings, "tags": [], "downloads": 0}


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.hub
        span = self.headers.get("Range")
        hub.log.append((self.command, self.path, span))
        if hub.status:
            return self._answer(hub.status, b"", {"X-Error-Code": hub.error_code} if hub.error_code else {})
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/revision/([\w.-]+)(\?.*)?", self.path):
            repo, revision = match[1], match[2]
            if repo not in hub.repos:
                return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            if revision not in ("main", "v2", COMMIT):
                return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return self._answer(200, json.dumps(hub.listing(repo)).encode(), {"Content-Type": "application/json"})
        if match := re.fullmatch(rf"/([\w.-]+/[\w.-]+)/resolve/{COMMIT}/([\w.-]+)", self.path):
            content = hub.repos.get(match[1], {}).get(match[2])
            if content is not None:
                time.sleep(hub.delay_s)
                return self._send_file(match[2], hub.served.get(match[2], content), span)
        return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    def _send_file(self, name: str, content: bytes, span: str | None) -> None:
        large = name.endswith((".safetensors", ".gguf"))
        etag = hashlib.sha256(content).hexdigest() if large else _blob_id(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status, body = 200, content
        if span and not self.hub.ignore_range:
            begin = int(re.fullmatch(r"bytes=(\d+)-", span)[1])
            status, body = 206, content[begin:]
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        if large and self.hub.cut_after is not None and self.command == "GET":
            cut, self.hub.cut_after = self.hub.cut_after, None
            return self._answer(status, body, headers, cut)
        return self._answer(status, body, headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client that refused what it saw
            super().handle()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub.utils import close_session

    found = Hub()
    handler = type("Handler", (_Handler,), {"hub": found})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    found.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", found.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    close_session()  # the client reads the proxy settings when it is made
    yield found
    close_session()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def tiny_llama():
    """(config.json as a dict, Hugging Face tensors in float32) of a two-layer Llama with grouped heads."""
    import torch

    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 96,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "eos_token_id": 2,
        "bos_token_id": 1,
    }  # fmt: skip
    from model_core.model.config import ModelConfig
    from model_core.weights.load import expected_shapes

    generator = torch.Generator().manual_seed(7)
    shapes = expected_shapes(ModelConfig.from_hf(config))
    return config, {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes.items()}


_LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
# What differs from tiny_llama's config, by family. Sliding windows are not said in GGUF files of architecture llama.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_tied": {"tie_word_embeddings": True, "hidden_size": 288, "num_attention_heads": 9, "num_key_value_heads": 3,
                   "head_dim": 32},
    "llama3": {"rope_parameters": _LLAMA3_ROPE},
    "llama_linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32, "num_attention_heads": 6},
}  # fmt: skip


@dataclass
class Sample:
    """One model in Hugging Face's terms: config.json and float32 tensors."""

    config: dict[str, Any]
    tensors: dict[str, Any]

    def save(self, folder: Path) -> Path:
        """As a folder with one model.safetensors."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        save_file(self.tensors, folder / "model.safetensors")
        return folder

    def save_gguf(self, path: Path, kinds: dict[str, str] | None = None, **metadata: Any) -> Path:
        """As llama.cpp's converter writes it: its names, q and k rows in its order for architecture llama.

        kinds: GGML type by GGUF name or what follows one of its dots ("" is every other matrix), F32 unless given;
        vectors stay F32.
        metadata: keys (with "__" for ".") added or replaced; None leaves one out.
        """
        import gguf

        config, kinds = self.config, kinds or {}
        path.parent.mkdir(parents=True, exist_ok=True)
        family = config["model_type"]
        arch = "llama" if family == "mistral" else family
        rope = config["rope_parameters"]
        meta: dict[str, Any] = {
            f"{arch}.block_count": config["num_hidden_layers"],
            f"{arch}.context_length": config["max_position_embeddings"],
            f"{arch}.embedding_length": config["hidden_size"],
            f"{arch}.feed_forward_length": config["intermediate_size"],
            f"{arch}.attention.head_count": config["num_attention_heads"],
            f"{arch}.attention.head_count_kv": config["num_key_value_heads"],
            f"{arch}.attention.key_length": config["head_dim"],
            f"{arch}.attention.value_length": config["head_dim"],
            f"{arch}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
            f"{arch}.rope.freq_base": rope["rope_theta"],
            f"{arch}.rope.dimension_count": config["head_dim"],
            f"{arch}.vocab_size": config["vocab_size"],
            "tokenizer.ggml.bos_token_id": config["bos_token_id"],
            "tokenizer.ggml.eos_token_id": config["eos_token_id"],
        }
        if rope["rope_type"] == "linear":
            meta |= {f"{arch}.rope.scaling.type": "linear", f"{arch}.rope.scaling.factor": rope["factor"]}
        meta |= {key.replace("__", "."): value for key, value in metadata.items()}
        writer = gguf.GGUFWriter(path, arch)
        for key, value in meta.items():
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            elif value is not None:
                writer.add_array(key, value)
        names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), config["num_hidden_layers"])
        for name, tensor in self.tensors.items():
            array = tensor.numpy()
            for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
                if arch == "llama" and name.endswith(f"{part}.weight"):
                    array = array.reshape(config[heads], 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
            stored = names.get_name(name, (".weight", ".bias"))
            kind = next((kind for end, kind in kinds.items() if not end or f".{stored}".endswith(f".{end}")), "F32")
            quantised = gguf.GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
            writer.add_tensor(stored, gguf.quants.quantize(array, quantised), raw_dtype=quantised)
        if rope["rope_type"] == "llama3":
            writer.add_tensor("rope_freqs.weight", _rope_factors(config))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def _rope_factors(config: dict[str, Any]) -> Any:
    """Llama 3.1's rule, one frequency at a time, as the release states it: [head_dim / 2] float32."""
    import numpy as np

    rope, dim, factors = config["rope_parameters"], config["head_dim"], []
    low, high, context = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    for index in range(0, dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (index / dim)
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(rope["factor"])
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


@pytest.fixture
def sample(tiny_llama):
    """sample(family, **config): a random two-layer model; every tensor random, norms and biases too."""
    import torch

    from model_core.model.config import ModelConfig
    from model_core.weights.load import expected_shapes

    def make(family: str = "llama", **changes: Any) -> Sample:
        config = tiny_llama[0] | {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
        config = config | FAMILIES[family] | changes
        generator = torch.Generator().manual_seed(len(family))
        return Sample(config, {name: torch.randn(shape, generator=generator) * 0.1 + ("norm" in name)
                               for name, shape in expected_shapes(ModelConfig.from_hf(config)).items()})

    return make


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param
