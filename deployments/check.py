"""`mini-llm check`: whatever can be known to be wrong with serve_config.yaml on this machine before anything starts."""

from __future__ import annotations

import argparse
import errno
import inspect
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import yaml
from pydantic import BaseModel, ValidationError

from deployments.settings import AppArgs, check_keys, describe, explain, nearest, parse_args
from model_core.errors import ConfigError, MiniLLMError

if TYPE_CHECKING:
    from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

    from deployments.app import Placement

BUILDER = "deployments.app:build"
_HAPROXY_PORTS = {  # with Serve's defaults
    "RAY_SERVE_HAPROXY_METRICS_PORT": "9101",
    "RAY_SERVE_HAPROXY_STATS_PORT": "8404",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": "8500",
}
_MARKS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "error": "[bold red]error[/]"}


@dataclass(frozen=True)
class Finding:
    """One line of the report. "error": the server would not start; "note": it would, but somebody should know."""

    what: str
    state: Literal["ok", "note", "error"]
    text: str


def main(argv: list[str]) -> int:
    """0 if the configuration can be served here, 1 if not."""
    parser = argparse.ArgumentParser("mini-llm check", description="Check a Serve configuration before anything starts.")
    parser.add_argument("config", nargs="?", default="serve_config.yaml", type=Path)
    parser.add_argument("--keys", action="store_true", help="print every key of `args:`, its default and its meaning")
    options = parser.parse_args(argv)
    if options.keys:
        print(describe())
        return 0
    findings = list(check(options.config))
    show(findings)
    return int(any(finding.state == "error" for finding in findings))


def show(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for finding in findings:
        table.add_row(finding.what, _MARKS[finding.state], escape(finding.text))
    Console(soft_wrap=False).print(table)


def check(path: Path) -> Iterator[Finding]:
    """Everything in the order a person would look at it. Raises nothing; what goes wrong is a finding."""
    try:
        config = read_config(path)
        applications = [(application, read_args(application)) for application in config.applications]
    except ConfigError as error:
        yield Finding("configuration", "error", str(error))
        return
    names = ", ".join(f"{application.name} ({application.import_path})" for application, _ in applications)
    yield Finding("configuration", "ok", f"{path}: {names}")
    yield from _check_ports(config)
    if config.http_options.request_timeout_s is not None:
        yield Finding("deadlines", "note", f"http_options.request_timeout_s is {config.http_options.request_timeout_s:g}: Ray "
                                           "Serve cuts streams then, without a word; limits.request_timeout_s ends them with "
                                           "an error")  # fmt: skip
    yield from _check_access(config, [args for _, args in applications if isinstance(args, AppArgs)])
    for application, args in applications:
        if isinstance(args, AppArgs):
            yield from _check_application(application, args)


# ---- the file ------------------------------------------------------------------------------------------------------


def read_config(path: Path) -> ServeDeploySchema:
    """The file as Ray Serve reads it. Raises ConfigError; also for keys that Serve itself would silently ignore."""
    from ray.serve.schema import ServeDeploySchema

    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; name a Serve configuration") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} holds no mapping; it should begin like the serve_config.yaml of this project")
    try:
        check_keys(ServeDeploySchema, content)
        config = ServeDeploySchema.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error)}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not config.applications:
        raise ConfigError(f"{path}: applications is empty; there is nothing to serve")
    return config


def read_args(application: ServeApplicationSchema) -> BaseModel | None:
    """The `args:` of an application, by the type that its builder declares; None if it declares none. ConfigError."""
    module, _, name = application.import_path.replace(":", ".").rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `serve run` does
    try:
        found = __import__(module, fromlist=[name])
    except ImportError as error:
        raise ConfigError(f"import_path {application.import_path!r} of application {application.name!r} cannot be "
                          f"imported: {error}; is this the project's folder?") from None  # fmt: skip
    if not hasattr(found, name):
        raise ConfigError(f"import_path {application.import_path!r}: {module} has no {name}; "
                          f"{nearest(name, [key for key in vars(found) if not key.startswith('_')])}")  # fmt: skip
    builder = getattr(found, name)
    parameters = list(inspect.signature(builder).parameters.values()) if inspect.isfunction(builder) else []
    kind = parameters[0].annotation if len(parameters) == 1 else None
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return None
    try:
        return parse_args(application.args, kind)
    except ConfigError as error:
        raise ConfigError(f"args of application {application.name!r}: {error}") from None


# ---- the machine ---------------------------------------------------------------------------------------------------


def _check_ports(config: ServeDeploySchema) -> Iterator[Finding]:
    host = config.http_options.host
    flags = controller_environment(config)
    ports = [("http_options.port", host, str(config.http_options.port))]
    if flags.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        ports += [(key, "0.0.0.0", flags.get(key, default)) for key, default in _HAPROXY_PORTS.items()]
    problems = []
    for key, address, number in ports:
        problem = _port_problem(address, number)
        if problem:
            where = "" if key.startswith("http") else ", in env_vars of controller_options and of the application"
            text = f"{key} {number} {problem}: stop what listens there, or set another{where}"
            problems.append(Finding("ports", "error", text))
    listed = ", ".join(f"{address}:{number}" for _, address, number in ports)
    yield from problems or [Finding("ports", "ok", f"{listed} are free")]
    for application in config.applications:
        own = application.runtime_env.get("env_vars", {})
        unlike = sorted(key for key in {*own, *flags} if key.startswith("RAY_SERVE_") and own.get(key) != flags.get(key)
                        and key not in os.environ)  # fmt: skip
        if unlike:
            yield Finding("flags", "note", f"{', '.join(unlike)}: set for the controller or for application "
                                           f"{application.name!r} alone; Serve wants the same in both")  # fmt: skip


def _check_access(config: ServeDeploySchema, applications: list[AppArgs]) -> Iterator[Finding]:
    host = config.http_options.host
    if host not in ("127.0.0.1", "localhost", "::1") and not all(args.access.needs_key for args in applications):
        yield Finding("access", "note", f"http_options.host is {host}: every machine that reaches it may use the server; "
                                        "there is no authentication without access.keys")  # fmt: skip
    for args in applications:
        try:
            args.access.settled(Path.cwd())
        except ConfigError as error:
            yield Finding("access", "error", str(error))


def controller_environment(config: ServeDeploySchema) -> dict[str, str]:
    """The environment variables that decide how the controller works: the YAML's over this process' own."""
    options = config.controller_options
    named = (options.runtime_env or {}).get("env_vars", {}) if options else {}
    return {**{key: value for key, value in os.environ.items() if key.startswith("RAY_SERVE_")}, **named}


def _port_problem(host: str, number: str) -> str | None:
    if not number.isdecimal() or not 1 <= int(number) <= 65535:
        return "is no port number (1 to 65535)"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections of the last run do not count
        try:
            probe.bind((host, int(number)))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return f"is in use on {host}"
            return f"cannot be used on {host} ({error.strerror})"
    return None


# ---- the model -----------------------------------------------------------------------------------------------------


def _check_application(application: ServeApplicationSchema, args: AppArgs) -> Iterator[Finding]:
    try:
        finding, path = _check_weights(args)
    except MiniLLMError as error:
        finding, path = Finding("weights", "error", str(error)), None
    yield finding
    if application.import_path != BUILDER:
        yield Finding("engine", "note", f"{application.import_path} brings its own; not checked")
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    if address != "local":
        yield Finding("engine", "note", f"device and memory are those of the cluster at {address}; not checked")
        return
    from deployments.app import place
    from model_core.engine.load import gpu_names

    gpus = gpu_names()
    try:
        placement = place(args, len(gpus), os.cpu_count() or 1)
    except ConfigError as error:
        yield Finding("device", "error", str(error))
        return
    name = gpus[0] if placement.device == "cuda" else f"{os.cpu_count()} cores"
    counts = f"replicas: {placement.replicas} of the model, {placement.api_replicas} of the HTTP API"
    yield Finding("device", "ok", f"{placement.device} ({name}); {counts}")
    if path is not None:
        yield from _check_engine(path, args, placement)


def _check_weights(args: AppArgs) -> tuple[Finding, Path | None]:
    """The finding, and the folder or file of the model that would be served if it is here already.

    Asks the hub only if the model is not complete. Raises what that raises: DownloadError, UnsupportedModel, ConfigError.
    """
    from model_core.weights import hub
    from model_core.weights.fallback import parse_requirement
    from model_core.weights.folder import find_complete
    from model_core.weights.progress import format_bytes

    weight_dir = Path(args.weight_dir).expanduser().absolute()
    pin = parse_requirement(args.fallback) if args.fallback else None
    local = Path(args.model).expanduser()
    if local.exists():
        return Finding("weights", "ok", f"{local}, as it is"), local.absolute()
    folder = find_complete(weight_dir, args.model, args.revision)
    if folder:
        return Finding("weights", "ok", f"{args.model} is complete in {folder}"), folder
    absent = f"{args.model} is not complete in {weight_dir}"
    try:
        snapshot = hub.snapshot(args.model, args.revision)
    except hub.HubUnreachable as error:
        if pin is None:
            remedy = "set HF_ENDPOINT to a mirror, copy the model's files there, or set fallback"
            return Finding("weights", "error", f"{absent} and no hub can be reached ({error}): {remedy}"), None
        folder = find_complete(weight_dir, *pin)
        where = f"complete in {folder}" if folder else "to be fetched from the package index"
        return Finding("weights", "note", f"{absent} and no hub can be reached ({error}): the FALLBACK {pin[0]} is served, "
                                          f"{where}"), folder  # fmt: skip
    free = shutil.disk_usage(next(place for place in (weight_dir, *weight_dir.parents) if place.exists())).free
    text = (f"{absent}; {len(snapshot.files)} files of {format_bytes(snapshot.nbytes)} will be fetched from {hub.endpoint()}, "
            f"{format_bytes(free)} are free")  # fmt: skip
    if snapshot.nbytes > free:
        return Finding("weights", "error", f"{text}: set weight_dir to a larger disk"), None
    return Finding("weights", "ok", text), None


def _check_engine(path: Path, args: AppArgs, placement: Placement) -> Iterator[Finding]:
    """Opens the checkpoint (headers only) and its tokenizer, does the sums of the memory ledger, and reads `kernels`."""
    from model_core.dispatch.ops import Ops
    from model_core.engine import load
    from model_core.engine.memory import GIB
    from model_core.tokenizer import load_tokenizer
    from model_core.weights.checkpoint import open_checkpoint
    from model_core.weights.load import check_tensors

    try:
        checkpoint = open_checkpoint(path)
        check_tensors(checkpoint)
        model, vocab_size = checkpoint.config, load_tokenizer(path).vocab_size
        text = f"{model.family}, {model.num_parameters / 1e6:.0f}M parameters, {vocab_size} tokens"
        yield Finding("model", "ok", text)
        placed = load.place(model, args.engine.config(placement.device))
        Ops(placed.device, overrides=args.engine.kernels, invariant=args.engine.deterministic)
    except (MiniLLMError, OSError) as error:
        yield Finding("model", "error", str(error))
        return
    ledger = placed.ledger
    together = ledger.total * placement.replicas
    if placement.device == "cpu" and together > ledger.available:
        text = f"{placement.replicas} replicas take {together / GIB:.2f} GiB, {ledger.available / GIB:.2f} are available"
        yield Finding("memory", "error", f"{text}: lower replicas or engine.kv_cache_bytes")
        return
    yield Finding("memory", "ok", f"{ledger}; context {placed.limits.max_context} tokens, {placed.limits.max_seqs} "
                                  f"sequences at once, {ledger.num_pages} pages of {args.engine.page_size} tokens")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
