"""`mini-llm serve`: what `serve run` does with the same file, with an end to the waiting.

`serve run` keeps running, and says nothing at the end of its tracebacks, when the application cannot be deployed. This
launcher checks first, follows the deployment, exits 1 with one message if it fails, and stops everything in seconds.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployments.check import read_config
from deployments.said import condense, explain_failure, print_worker_lines
from model_core.errors import ConfigError, MiniLLMError

if TYPE_CHECKING:
    from ray.serve.schema import ServeDeploySchema

STARTING_POLL_S = 0.3
RUNNING_POLL_S = 2.0
ANSWER_S = 30.0  # from "the application runs" to an answer through the proxy; seen: 0.5 to 3 s
# Whoever presses Ctrl-C does not want to wait: running requests get GRACE_S to end (after SIGTERM drain_timeout_s).
# Serve's shutdown takes 2 to 4 s, and Ray's own end two more.
GRACE_S = 1.0
FAREWELL_S = 3.0  # until the HTTP replicas have told their clients
SHUTDOWN_S = 4.0
_FAILED = ("DEPLOY_FAILED", "UNHEALTHY")


class DeploymentFailed(MiniLLMError):
    """Serve gave up on the application; the text is what it knows, without the tracebacks."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which service managers send: those who wait for answers come first."""


def main(argv: list[str]) -> int:
    """Serves until Ctrl-C or SIGTERM, then returns 0; 1 if the checks or the deployment fail."""
    parser = argparse.ArgumentParser("mini-llm serve", description="Check, start and watch a Ray Serve configuration.")
    parser.add_argument("config", nargs="?", default="serve_config.yaml", type=Path)
    options = parser.parse_args(argv)
    _catch_signals()
    try:
        # In a process of its own, because on a GPU it makes a CUDA context of half a GiB to ask for free memory; in a
        # session of its own, because Ctrl-C is our business.
        checking = [sys.executable, "-m", "deployments.check", str(options.config)]
        if subprocess.run(checking, start_new_session=True).returncode:
            return 1
        with _run_folder() as folder, _environment(folder):
            return _serve(read_config(options.config))
    except ConfigError as error:
        return _fail(error)
    except KeyboardInterrupt:
        return 0


def _serve(config: ServeDeploySchema) -> int:
    began = time.monotonic()
    _say("starting Ray")
    import ray
    from ray._private import worker

    # Ray's own prints every line of every process, with colours and pids, and each failure of its tasks
    worker.print_to_stdstream = print_worker_lines
    try:
        context = ray.init(namespace="serve", logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError) as error:
        return _fail(f"Ray did not start: {error}")
    failure, graces = None, dict[str, float]()
    try:
        _catch_signals()  # again: Ray has put a handler of its own in the place of ours
        _deploy(config)
        _follow(config)
        _wait_for_answer(config)
        _announce(config, context.dashboard_url, time.monotonic() - began)
        _watch()
    except DeploymentFailed as error:
        failure = error
    except Terminated:
        graces = _drain_timeouts(config)
    except KeyboardInterrupt:
        pass
    finally:
        _stop(graces)
    return 0 if failure is None else _fail(failure)


def _deploy(config: ServeDeploySchema) -> None:
    """The same two calls as `serve run` makes (ray/serve/scripts.py of 2.60, which is pinned); both are private.

    Raises DeploymentFailed if Serve's controller or proxy does not start.
    """
    from ray.serve._private.api import serve_start
    from ray.serve.config import gRPCOptions

    _say("starting Ray Serve")
    try:
        client = serve_start(
            http_options=config.http_options.model_dump(),
            proxy_location=config.proxy_location,
            grpc_options=gRPCOptions(**config.grpc_options.model_dump()),
            controller_options=config.controller_options,
        )
        client.deploy_apps(config)
    except Exception as error:  # Ray's, Serve's, or what a proxy raised in its own process
        raise DeploymentFailed(f"Ray Serve did not start: {type(error).__name__}: {condense(str(error))}") from None


def _follow(config: ServeDeploySchema) -> None:
    """Returns when every application runs. Raises DeploymentFailed."""
    from ray import serve

    names = {application.name for application in config.applications}
    said: dict[str, str] = {}
    while True:
        found = serve.status().applications
        for name, text in _progress(found):
            if said.get(name) != text:
                said[name] = text
                _say(f"{name}: {text}")
        failed = [explain_failure(name, app) for name, app in found.items() if app.status in _FAILED]
        if failed:
            raise DeploymentFailed("\n".join(failed))
        if names <= {name for name, app in found.items() if app.status == "RUNNING"}:
            return
        time.sleep(STARTING_POLL_S)


def _progress(applications: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, app in applications.items():
        if not app.deployments and app.status == "DEPLOYING":
            yield name, "weights, then replicas"
        for part, deployment in app.deployments.items():
            counts = ", ".join(f"{count} {state.lower()}" for state, count in deployment.replica_states.items() if count)
            yield f"{name}/{part}", f"{deployment.status.lower()}{f' ({counts})' if counts else ''}"


def _wait_for_answer(config: ServeDeploySchema) -> None:
    """The application runs; its proxy hears of that a moment later."""
    end = time.monotonic() + ANSWER_S
    status = 0
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(_url(config) + "/ready", timeout=5) as answer:
                status = answer.status
        except urllib.error.HTTPError as error:
            status = error.code
        except OSError:
            status = 0
        if 0 < status < 500:
            return
        time.sleep(STARTING_POLL_S)
    what = f"HTTP {status}" if status else "no connection"
    raise DeploymentFailed(f"the application runs but {_url(config)}/ready gives {what} for {ANSWER_S:.0f} s; see Ray's "
                           "logs of the proxy (/tmp/ray/session_latest/logs/serve)")  # fmt: skip


def _watch() -> None:
    """Reports changes of status for as long as Serve lives. Raises DeploymentFailed when it does not any more."""
    from ray import serve

    before: dict[str, str] = {}
    while True:
        try:
            now = {name: str(app.status.value) for name, app in serve.status().applications.items()}
        except Exception as error:  # the controller is restarted by Ray; without Ray there is nothing left to watch
            raise DeploymentFailed(f"Ray Serve is gone: {type(error).__name__}: {str(error)[:500]}") from None
        for name, status in now.items():
            if before.get(name, "RUNNING") != status:
                _say(f"{name}: {status.lower()}")
        before = now
        time.sleep(RUNNING_POLL_S)


def _announce(config: ServeDeploySchema, dashboard: str | None, seconds: float) -> None:
    _say(f"ready after {seconds:.1f} s")
    lines = [f"API         {_url(config)}/v1   (POST /v1/chat/completions, /v1/completions; GET / lists the rest)"]
    if dashboard:
        lines.append(f"dashboard   http://{dashboard}")
        if os.environ.get("RAY_AUTH_MODE", "token") == "token":
            lines.append("            asks for a token: the content of ~/.ray/auth_token, or `ray get-auth-token`")
    print("\n".join(["", *lines, "stop        Ctrl-C", ""]), flush=True)


def _drain_timeouts(config: ServeDeploySchema) -> dict[str, float]:
    """Seconds by application."""
    from deployments.settings import AppArgs

    default = AppArgs.model_fields["drain_timeout_s"].default
    return {one.name: float(one.args.get("drain_timeout_s", default)) for one in config.applications}


def _stop(graces: Mapping[str, float]) -> None:
    """Requests first, then Serve, so that replicas end in order; then Ray, if it is ours, with whatever is left.

    graces: seconds that the running requests of an application get; GRACE_S if it is not there.
    """
    import ray
    from ray import serve

    longest = max(graces.values(), default=GRACE_S)
    _say(f"stopping: running requests get {longest:g} s, or until Ctrl-C" if graces else "stopping")
    with suppress(KeyboardInterrupt):  # a second signal: no more patience
        for work, seconds in ((partial(_end_requests, graces), longest + FAREWELL_S), (serve.shutdown, SHUTDOWN_S)):
            thread = threading.Thread(target=_quietly, args=(work,), daemon=True)
            thread.start()
            thread.join(seconds)
    ray.shutdown()


def _end_requests(graces: Mapping[str, float]) -> None:
    """Streams end whole, or with an error in our envelope: Serve would cut them."""
    from ray import serve

    seconds = {name: graces.get(name, GRACE_S) for name in serve.status().applications}
    calls = {name: serve.get_app_handle(name).broadcast("stop", seconds[name]) for name in seconds}
    for name, call in calls.items():
        call.results(timeout_s=seconds[name] + FAREWELL_S, return_exceptions=True)


def _quietly(call: Any) -> None:
    with suppress(Exception):
        call()


# ---- small things --------------------------------------------------------------------------------------------------


def _url(config: ServeDeploySchema) -> str:
    host = config.http_options.host
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{host}:{config.http_options.port}{config.applications[0].route_prefix or '/'}".rstrip("/")


def _say(text: str) -> None:
    print(f"[serve] {text}", flush=True)


def _fail(reason: object) -> int:
    print(f"\nerror: {reason}", file=sys.stderr, flush=True)
    return 1


@contextmanager
def _run_folder() -> Iterator[Path]:
    """A short-lived folder for HAProxy's files: by default they lie in one place of /tmp, for every user and server."""
    folder = Path(tempfile.mkdtemp(prefix="mini-llm-", dir="/tmp"))  # the path of a Unix socket has at most 107 bytes
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _environment(folder: Path) -> Iterator[None]:
    """What Ray's processes inherit. Whatever the user has set stays."""
    before = dict(os.environ)
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # under `uv run`, workers would build environments anew
    for key, name in (("CONFIG_FILE_LOC", "haproxy.cfg"), ("SOCKET_PATH", "admin.sock"), ("SERVER_STATE_BASE", ""),
                      ("SERVER_STATE_FILE", "server-state"), ("METRICS_SOCKET_PATH", "metrics.sock")):  # fmt: skip
        os.environ.setdefault(f"RAY_SERVE_HAPROXY_{key}", str(folder / name))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _interrupt(number: int, frame: Any) -> None:
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _catch_signals() -> None:
    """Ctrl-C acts even if the parent had it ignored (as shells do for `&`)."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
