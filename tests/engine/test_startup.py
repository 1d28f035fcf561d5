"""The waterfall of a start-up: moments, overlaps, the line that benchmarks read, and weights that arrive while it goes on."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time

import pytest
import torch

from benchmarks.random_model import write_model
from model_core import head_start
from model_core.engine import load, startup
from model_core.engine.config import EngineConfig
from model_core.engine.startup import StartUp, Step, waterfall
from model_core.errors import CheckpointError
from model_core.weights.checkpoint import open_checkpoint
from model_core.weights.load import empty_parameters


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model("tiny", tmp_path_factory.mktemp("model") / "tiny", dtype=torch.float32)


CONFIG = EngineConfig(device="cpu", kv_cache_bytes=1 << 20, max_seqs=2)


def test_the_age_of_a_process_counts_from_its_start():
    code = "import time; time.sleep(0.3); from model_core.engine import startup; print(startup.process_age())"
    began = time.monotonic()
    age = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0.3 < age <= time.monotonic() - began + 0.02  # the start is known to a hundredth


def test_bars_stand_where_the_steps_were():
    steps = [Step("second", 2.0, 4.0, "2 GB"), Step("first", 0.0, 2.0), Step("at the end", 4.0, 4.0)]
    assert waterfall(steps) == [
        "first        2.00 s |" + "█" * 20 + " " * 20 + "|   2.00 s",
        "second       2.00 s |" + " " * 20 + "█" * 20 + "|   4.00 s  2 GB",
        "at the end   0.00 s |" + " " * 39 + "▏|   4.00 s",
    ]
    assert waterfall([]) == []
    assert [line[-10:] for line in waterfall([Step("later", 100.0, 101.0)])] == ["|   1.00 s"]  # from its own start


def test_seconds_add_up_though_steps_overlap():
    found = StartUp()
    found.steps = [Step("a", 1.0, 2.0), Step("b", 2.0, 3.5), Step("weights", 1.5, 4.0), Step("c", 3.5, 6.0),
                   Step("a", 6.0, 6.5)]  # fmt: skip
    assert found.seconds() == {"a": 1.5, "b": 1.5, "weights": 0.5, "c": 2.0}


def test_a_step_that_raises_is_not_kept():
    found = StartUp()
    with pytest.raises(ValueError), found.timed("broken"):
        raise ValueError
    with found.timed("whole") as step:
        time.sleep(0.01)
        step.note = f"{step.so_far:.2f}"
    assert [(one.name, one.note) for one in found.steps] == [("whole", "0.01")]
    assert 0.01 <= found.steps[0].ended - found.steps[0].began < 1


def test_an_engine_logs_its_waterfall_and_the_line_of_it(folder, caplog, monkeypatch):
    monkeypatch.setattr(startup, "_imports_seen", False)
    with caplog.at_level(logging.INFO, "mini_llm.engine"):
        parts = load.load_parts(folder, CONFIG)
    names = ["imports", "open", "weights", "model", "KV pool", "warm-up", "ready"]
    assert [step.name for step in parts.startup.steps] == names and parts.startup.steps[0].began == 0
    lines = [record.getMessage() for record in caplog.records]
    at = next(index for index, line in enumerate(lines) if line.startswith("start-up: "))
    shown = lines[at - len(names) : at]  # seconds since this process began: minutes, in a whole run of the tests
    assert all(line.strip().startswith(f"{name} ") for line, name in zip(shown, names, strict=True)), shown
    words = [part.split() for part in lines[at].removeprefix("start-up: ").split(", ")]
    assert [" ".join(words[:-2]) for words in words] == names and {words[-1] for words in words} == {"s"}
    assert sum(float(words[-2]) for words in words) == pytest.approx(parts.startup.steps[-1].ended, abs=0.05)
    caplog.clear()
    again = load.load_parts(folder, CONFIG)
    assert [step.name for step in again.startup.steps] == names[1:]  # a second engine imports nothing


def assembled(folder, weights):
    checkpoint = open_checkpoint(folder)
    placed = load.place(checkpoint.config, CONFIG)
    parameters = empty_parameters(checkpoint, dtype=placed.dtype, device=placed.device)
    for tensor in parameters.tensors():
        tensor.zero_()
    return load.assemble(checkpoint.config, parameters, CONFIG, placed, weights=weights)


def test_an_engine_is_not_ready_before_its_weights_and_their_error_comes_out(folder):
    read, asked = threading.Event(), threading.Event()

    def weights():
        asked.set()
        assert read.wait(60)

    found = []
    thread = threading.Thread(target=lambda: found.append(assembled(folder, weights)))
    thread.start()
    assert asked.wait(60) and not found
    read.set()
    thread.join(60)
    assert len(found) == 1

    def broken():
        raise CheckpointError("x is truncated")

    with pytest.raises(CheckpointError, match="x is truncated"):
        assembled(folder, broken)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_without_a_driver_there_is_nothing_to_begin():
    assert not head_start.begin() and not head_start._threads
    head_start.wait()


def test_a_head_start_begins_the_context_and_hashes_what_triton_will_ask_for(monkeypatch):
    triton_cache = pytest.importorskip("triton.runtime.cache")

    class Driver:
        called: list[str] = []

        def __getattr__(self, name):
            return lambda *args: self.called.append(name) or 0

    monkeypatch.setattr(head_start.ctypes, "CDLL", lambda name: Driver())
    monkeypatch.setattr(head_start, "_threads", [])
    assert head_start.begin() and head_start.begin()
    head_start.wait()
    assert Driver.called == ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]  # once
    assert triton_cache.triton_key.cache_info().currsize == 1


def test_a_head_start_imports_no_torch():
    code = "import sys, triton.runtime.cache; from model_core import head_start; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
