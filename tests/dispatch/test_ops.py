"""Which implementation runs: the rule, overrides, and what explain() says about them."""

import json

import pytest
import torch

from model_core.dispatch.ops import Ops
from model_core.dispatch.table import OPS, by_threshold, only
from model_core.errors import ConfigError
from model_core.kernels import rmsnorm, runtime

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def test_the_rule_is_triton_above_the_threshold():
    table = by_threshold("rmsnorm", 128)
    assert [table.choose(tokens) for tokens in (1, 128, 129, 100_000)] == ["torch", "torch", "triton", "triton"]
    assert only("torch", "because").choose(5000) == "torch"


def test_a_cpu_runs_the_references_unless_told_otherwise():
    ops = Ops("cpu")
    assert all(row["choice"] == "torch" for row in ops.explain())
    assert {row["op"] for row in ops.explain()} == set(OPS)


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_a_gpu_follows_the_rule():
    rows = [row for row in Ops("cuda").explain() if row["op"] == "swiglu"]
    assert [(row["rule"], row["choice"]) for row in rows] == [("tokens <= 128", "torch"), ("tokens > 128", "triton")]


@pytest.mark.parametrize("choice", ["torch", "triton"])
def test_an_override_is_what_runs(monkeypatch, choice):
    called = []
    for name in ("rmsnorm", "rmsnorm_torch"):
        original = getattr(rmsnorm, name)
        monkeypatch.setattr(rmsnorm, name, lambda *args, name=name, original=original: called.append(name) or original(*args))
    ops = Ops(DEVICE, overrides={"default": "torch", "rmsnorm": choice})
    x, weight = torch.randn(3, 64, device=DEVICE), torch.ones(64, device=DEVICE)
    y = ops.rmsnorm(x, weight, 1e-5)
    assert called[0] == {"torch": "rmsnorm_torch", "triton": "rmsnorm"}[choice]
    assert torch.allclose(y, torch.nn.functional.rms_norm(x, (64,), weight, 1e-5), atol=1e-5)
    row = next(row for row in ops.explain() if row["op"] == "rmsnorm")
    assert row["choice"] == choice and "override" in row["reason"]
    assert next(row for row in ops.explain() if row["op"] == "swiglu")["choice"] == "torch"


@pytest.mark.parametrize("overrides,message", [
    ({"rmsnrm": "torch"}, "did you mean 'rmsnorm'"), ({"rmsnorm": "tritn"}, "did you mean 'triton'"),
    ({"default": "cuda"}, "one of: torch, triton, auto"),
])  # fmt: skip
def test_unknown_names_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        Ops("cpu", overrides=overrides)


def test_triton_where_it_cannot_run_is_refused(monkeypatch):
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    with pytest.raises(ConfigError, match=r"kernels\.swiglu: triton cannot run here"):
        Ops("cpu", overrides={"swiglu": "triton"})


def test_a_negative_threshold_is_refused():
    with pytest.raises(ConfigError, match="threshold"):
        Ops("cpu", threshold=-1)


def test_explain_is_json():
    assert json.loads(json.dumps(Ops(DEVICE).explain())) == Ops(DEVICE).explain()
