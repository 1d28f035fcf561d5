"""A model hub on 127.0.0.1 that the real huggingface_hub client accepts, with faults to order."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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
