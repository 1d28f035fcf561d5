"""Graphs are captured when nobody is served: at start, and after a quiet time, but not between two requests of a client."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from benchmarks.random_model import write_model
from model_core.engine import engine as module
from model_core.engine.config import EngineConfig
from model_core.engine.engine import Engine
from model_core.engine.request import Request, SamplingParams
from tests.engine.served import Served

GRAPHS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model("tiny", tmp_path_factory.mktemp("model") / "tiny", dtype=torch.float32)


class Capturing(Served):
    """On a CPU: its runner captures graphs, each as long as `allowed` lets it (None: a moment)."""

    def __init__(self, folder, allowed: threading.Semaphore | None = None) -> None:
        engine = Engine.load(folder, EngineConfig(device="cpu", kv_cache_bytes=1 << 20, max_seqs=2, threads=1))
        self.captured, self.allowed = list[float](), allowed
        runner = engine.parts.runner

        class Slow(type(runner)):  # `unprepared` is a property
            unprepared = property(lambda _: GRAPHS - len(self.captured))
            prepare = lambda _: self._capture()  # noqa: E731

        runner.__class__ = Slow
        super().__init__(engine)

    def _capture(self) -> None:
        if self.allowed is not None:
            assert self.allowed.acquire(timeout=30)
        with self.changed:
            self.captured.append(time.monotonic())
            self.changed.notify_all()

    def left(self) -> int:
        return self.engine.stats().graphs_to_capture


def request(name: str) -> Request:
    return Request(name, [1, 2, 3], SamplingParams(max_tokens=3, ignore_eos=True))


def test_they_begin_at_start(folder, monkeypatch):
    monkeypatch.setattr(module, "_QUIET_S", 1000.0)
    served = Capturing(folder)
    served.until(lambda: len(served.captured) == GRAPHS)
    assert served.left() == 0
    served.ask(request("and it serves"))
    served.engine.shutdown()


def test_a_newcomer_waits_for_one_at_most(folder, monkeypatch):
    """The others follow when it has been quiet."""
    monkeypatch.setattr(module, "_QUIET_S", 0.1)
    allowed = threading.Semaphore(1)
    served = Capturing(folder, allowed)
    served.until(lambda: served.captured)  # and the thread is in the second one, or about to be
    served.submit(request("a"))
    allowed.release()
    served.wait("a")
    assert len(served.captured) <= 2
    allowed.release(GRAPHS)
    served.until(lambda: len(served.captured) == GRAPHS)
    ended = served.times["a"][-1]
    late = [moment for moment in served.captured if moment > ended]
    assert late and late[0] - ended >= 0.1 - 0.02  # the last step's events left a bit after it
    served.engine.shutdown()


def test_none_between_the_requests_of_a_client(folder, monkeypatch):
    monkeypatch.setattr(module, "_QUIET_S", 1000.0)
    allowed = threading.Semaphore(1)
    served = Capturing(folder, allowed)
    served.until(lambda: served.captured)
    served.submit(request("first"))
    allowed.release()
    served.wait("first")
    captured = len(served.captured)
    allowed.release(GRAPHS)
    for number in range(20):
        served.ask(request(f"r{number}"))
    time.sleep(0.05)  # idle, but not for long
    assert len(served.captured) == captured and served.left() == GRAPHS - captured
    assert served.engine.stage == "idle"
    served.engine.shutdown()
