"""Compiling ahead can only help."""

from __future__ import annotations

import io
import os
import pickle
import time
from functools import partial

import pytest
import torch

from model_core.dispatch import compile as compiler
from model_core.dispatch.compile import compile_ahead
from model_core.kernels.decode.embed import embed
from model_core.kernels.decode.tiles import Stream

TARGET = ("cuda", 90, 32)




@pytest.fixture
def workers(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield tmp_path / "triton"
    compiler.release()
    assert not list(tmp_path.glob("mini-llm-compile-*"))


def an_embed(hidden, vocab=100):
    rows, table, gain = torch.zeros(2, dtype=torch.int64), torch.zeros(vocab, hidden), torch.zeros(hidden)
    return partial(embed, table, gain, rows, rows, Stream(2, hidden, torch.float32, "cpu"), pdl=False)


def test_kernels_land_in_the_cache_and_a_job_that_raises_harms_nobody(workers):
    jobs = [an_embed(32), partial(int, "no number"), an_embed(64), an_embed(64)]
    assert compile_ahead(jobs, 2, target=TARGET, stamp="these") == {}
    assert len(list(workers.rglob("*.cubin"))) == 2
    compiler.release()
    assert compile_ahead(jobs, 2, target=TARGET, stamp="these") == {} and compiler._pool is None  # at once


def test_workers_that_die_are_harmless(workers, caplog):
    assert compile_ahead([partial(os._exit, 3)] * 2, 2, target=TARGET, stamp="dying") == {}
    assert "launches compile instead" in caplog.text and compiler._pool is None
    assert not list(workers.glob("mini-llm-*[!k]"))  # no stamp: the next start tries again


@pytest.mark.parametrize("break_it", ["executable", "pickle", "timeout"])
def test_a_pool_that_fails_is_harmless(workers, monkeypatch, caplog, break_it):
    jobs, timeout_s = [partial(int, 1)] * 2, 60.0
    if break_it == "executable":
        monkeypatch.setattr("sys.executable", "/nowhere/python")
    elif break_it == "pickle":
        jobs = [lambda: None] * 2
    else:
        jobs, timeout_s = [partial(time.sleep, 100)] * 2, 0.2
    assert compile_ahead(jobs, 2, target=TARGET, timeout_s=timeout_s) == {}
    assert compiler._pool is None and ("not compiled ahead" in caplog.text or "takes too long" in caplog.text)


def test_one_core_or_nothing_to_do_starts_no_process(monkeypatch):
    monkeypatch.setattr(compiler, "_open", None)
    assert compile_ahead([an_embed(32)] * 2, 1) == compile_ahead([], 8) == {}


def test_the_kernel_that_took_its_compiler_down_is_named(tmp_path):
    pool = object.__new__(compiler._Pool)
    pool.folder, pool._batch = tmp_path, 1
    (tmp_path / "claims").mkdir()
    claims = ["1 4\n", "1 5\nok", "1 6\nkernel: CompilationError: at 3:1", "0 7\n", ""]
    for number, text in enumerate(claims):
        (tmp_path / "claims" / str(number)).write_text(text)
    (tmp_path / "1.0").write_text("4 0\n8 3\n9 1\n")  # job 8 wants what crashed a batch before, job 9 what did not
    (tmp_path / "1.1-").write_text("11 0\n")
    (tmp_path / "0.1").write_text("12 0\n")
    assert pool._died() == dict.fromkeys([4, 8], "its compiler crashed")


def test_twins_have_everything_but_memory():
    base = torch.zeros(100, dtype=torch.float32)
    values = {"view": base[3:].as_strided((4, 5), (7, 1)), "row": base[:0], "scalar": torch.tensor(3), "plain": [base, base]}
    text = io.BytesIO()
    compiler._Pickler(text).dump(values)
    twins = pickle.loads(text.getvalue())
    for name in ("view", "row", "scalar"):
        twin, value = twins[name], values[name]
        assert twin.device.type == "meta"
        assert (twin.shape, twin.stride(), twin.dtype) == (value.shape, value.stride(), value.dtype)
        assert value.numel() == 0 or twin.data_ptr() % 16 == value.data_ptr() % 16
    assert twins["plain"][0] is twins["plain"][1]
