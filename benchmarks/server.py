"""A `serve run` on this repository's serve_config.yaml with ports of its own, for tests and benchmarks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
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
from collections.abc import Callable, Iterator, Mapping, Sequence
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

    def wait_captured(self, seconds: float = 60) -> None:
        """Until no engine has CUDA graphs left to capture: before, a request may wait for one."""
        left = re.compile(r"^mini_llm:graphs_to_capture{.*} (.*)$", re.MULTILINE)
        self.wait_until(lambda: {*left.findall(self.get("/metrics")[1])} == {"0.0"}, seconds)

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

    def pids(self, title: str = "") -> list[int]:
        """This server's processes (all that inherited its RAY_TMPDIR) whose command line begins with `title`."""
        mark = f"RAY_TMPDIR={self.ray_dir}\0".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (path / "environ").read_bytes() and (path / "cmdline").read_text().startswith(title):
                    found.append(int(path.name))
        return found

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
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, "-c", script, address], stdin=pipe, stdout=pipe, text=True, env=environment)

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-60:])


@contextlib.contextmanager
def serving(
    args: Mapping[str, Any],
    *,
    import_path: str | None = None,
    edit: Callable[[dict[str, Any]], None] = lambda config: None,
    command: Sequence[str] = (sys.executable, "-m", "ray.serve.scripts", "run"),
    root: Path = ROOT,
    wait: bool = True,
) -> Iterator[Server]:
    """Serve with serve_config.yaml, `args` merged over its own; ready on entry, stopped on exit.

    import_path: another builder, e.g. benchmarks.fake_engine:build. edit: changes the configuration before it is written.
    command: what is given its path. root: another checkout. wait: False enters as soon as the command was started.
    """
    directory = Path(tempfile.mkdtemp(prefix="mini-llm-"))  # short: Ray puts Unix sockets below it, 107 bytes at most
    config, http, nowhere = configuration(directory, args, import_path, root)
    edit(config)
    path = directory / "serve_config.yaml"
    path.write_text(yaml.safe_dump(config))
    log = directory / "serve.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, path], cwd=root, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True, env={
                **os.environ, "TRITON_INTERPRET": "0",
                "RAY_ADDRESS": "local", "RAY_TMPDIR": str(directory), "RAY_USAGE_STATS_ENABLED": "0",
                "HF_ENDPOINT": f"http://127.0.0.1:{nowhere}",  # nothing listens there: no hub, on any machine
            },
        )  # fmt: skip
    server = Server(process, http, log, directory, time.time())
    try:
        if wait:
            server.wait_ready()
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)


def configuration(
    directory: Path, args: Mapping[str, Any], import_path: str | None = None, root: Path = ROOT
) -> tuple[dict[str, Any], int, int]:
    """serve_config.yaml with ports and HAProxy files of its own, its HTTP port, and a port where nothing listens."""
    http, metrics, stats, fallback, nowhere = free_ports(5)
    config = yaml.safe_load((root / "serve_config.yaml").read_text())
    application = config["applications"][0]
    config["http_options"]["port"] = http
    application["args"] = {**application["args"], **args}
    if import_path:
        application["import_path"] = import_path
    own = {
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        # by default these lie in one place of /tmp, and two servers would read each other's configuration
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(directory / "metrics.sock"),
    }
    for part in (config["controller_options"], application):
        part["runtime_env"]["env_vars"] = {**part["runtime_env"]["env_vars"], **own}
    return config, http, nowhere


async def connect(protocol: asyncio.Protocol, port: int) -> None:
    """Open a connection of a protocol that is there already."""
    await asyncio.get_running_loop().create_connection(lambda: protocol, "127.0.0.1", port)


def free_ports(count: int) -> list[int]:
    """Above Ray's own, and below those that the system gives to whoever asks for any, as Ray's processes do meanwhile."""
    sockets: list[socket.socket] = []
    while len(sockets) < count:
        with contextlib.suppress(OSError):
            sockets.append(socket.create_server(("127.0.0.1", random.randrange(20_000, 32_000))))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
