"""A `serve run` on this repository's serve_config.yaml with ports of its own, for tests and benchmarks."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
START_S = 150  # on two cores and nothing else running: 25 s


@dataclass
class Server:
    """A running `serve run`. ray_dir: its RAY_TMPDIR. started: time.time() of the command."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    ray_dir: Path
    started: float

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> tuple[int, str]:
        """Status and body; status 0 if nothing answered."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except (OSError, urllib.error.URLError) as error:
            return 0, str(error)

    def wait_ready(self, seconds: float = START_S) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, f"serve run ended:\n{self.tail()}"
            return self.get("/ready")[0] == 200

        self.wait_until(ready, seconds)

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"still waiting after {seconds} s; the log:\n{self.tail()}"
            time.sleep(0.25)

    def model_pid(self) -> int:
        """Process id of the newest model replica, from the prefix that Ray gives its log lines."""
        return int(re.findall(r"ServeReplica:llm:Model pid=(\d+)", self.log.read_text())[-1])

    def stop(self) -> None:
        """Ctrl-C, then harder means."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(10)

    def daemons(self) -> list[str]:
        """Command lines of the processes that name this server's directory: Ray's daemons and workers."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if str(self.ray_dir) in line:
                    found.append(line)
        return found

    def watch(self, script: str) -> subprocess.Popen[str]:
        """Run Python code in a process of its own that may `ray.init(address=sys.argv[1])` into this cluster."""
        address = next(found[1] for line in self.daemons() if (found := re.search(r"--gcs-address=(\S+)", line)))
        environment = {**os.environ, "RAY_TMPDIR": str(self.ray_dir), "RAY_AUTH_MODE": "token"}
        return subprocess.Popen([sys.executable, "-c", script, address], stdout=subprocess.PIPE, text=True, env=environment)

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-60:])


@contextlib.contextmanager
def serving(args: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Serve with serve_config.yaml, `args` merged over its own; ready on entry, stopped on exit."""
    directory = Path(tempfile.mkdtemp(prefix="mini-llm-"))  # short: Ray puts Unix sockets below it, 107 bytes at most
    http, metrics, stats, nowhere = free_ports(4)
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    application = config["applications"][0]
    config["http_options"]["port"] = http
    application["args"] = {**application["args"], **args}
    ports = {"RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics), "RAY_SERVE_HAPROXY_STATS_PORT": str(stats)}
    for part in (config["controller_options"], application):
        part["runtime_env"]["env_vars"] = {**part["runtime_env"]["env_vars"], **ports}
    path = directory / "serve_config.yaml"
    path.write_text(yaml.safe_dump(config))
    log = directory / "serve.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("serve"), "run", path], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True, env={
                **os.environ, "RAY_ADDRESS": "local", "RAY_TMPDIR": str(directory), "RAY_USAGE_STATS_ENABLED": "0",
                "HF_ENDPOINT": f"http://127.0.0.1:{nowhere}",  # nothing listens there: no hub, on any machine
                **(environment or {}),
            },
        )  # fmt: skip
    server = Server(process, http, log, directory, time.time())
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
