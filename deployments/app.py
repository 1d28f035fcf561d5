"""The application: what `import_path` in serve_config.yaml names. Decides from the cluster where and how many."""

# No `from __future__ import annotations`: Serve reads the builder's annotation and wants the class, not its name.

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import ray
from ray import serve
from ray.serve import Application

from deployments.error_page import write_error_page
from deployments.hydrate import hydrate
from deployments.ingress import Api
from deployments.logs import log_to_stderr
from deployments.replica import Loader, ModelReplica, ReplicaSpec, load_engine
from deployments.settings import AppArgs
from model_core.errors import ConfigError
from model_core.weights.source import ModelSource

log = logging.getLogger("mini_llm.app")

MAX_ONGOING = 4096  # Serve's own default of 5 would starve the batch; the real limits are the gate's and the replica's
HEALTH_PERIOD_S = 2.0  # three bad answers replace a replica: 6 s after its engine died
HEALTH_TIMEOUT_S = 30.0
FAREWELL_S = 10.0  # so much longer than a model replica an HTTP replica may take to stop: it tells clients of the other's end


@dataclass(frozen=True)
class Placement:
    """Where the model replicas run: one GPU each, or half a core (of Ray's counting, so that a machine of one core can
    hold both deployments; torch takes the cores it wants)."""

    device: Literal["cpu", "cuda"]
    replicas: int
    api_replicas: int

    @property
    def num_gpus(self) -> int:
        return 1 if self.device == "cuda" else 0


def place(args: AppArgs, gpus: int, cpus: int) -> Placement:
    """Decide every "auto" for a cluster of so many GPUs and cores. Raises ConfigError if it cannot hold what was asked."""
    device = args.engine.device
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    if device == "cuda" and not gpus:
        raise ConfigError("engine.device is cuda but Ray sees no GPU in the cluster: set it to auto or cpu, or check "
                          "nvidia-smi and CUDA_VISIBLE_DEVICES")  # fmt: skip
    replicas = args.replicas if args.replicas != "auto" else (gpus if device == "cuda" else 1)
    if device == "cuda" and replicas > gpus:
        raise ConfigError(f"replicas is {replicas} but the cluster has {gpus} GPUs, one per replica: set replicas to "
                          f"auto or at most {gpus}")  # fmt: skip
    # An HTTP replica takes 1.1 ms of CPU for a request and 14 to 35 us for a token (EPYC), while a GPU may make 76,000 tokens/s
    # (TinyLlama on an H100) and 128 clients may come at once. Engines, HAProxy and Ray need the other cores. Only one replica
    # can hold a key to its limits.
    enough = 1 if device == "cpu" or args.access.counts else max(1, min(4 * replicas, cpus // 4))
    return Placement(device, replicas, enough if args.api_replicas == "auto" else args.api_replicas)


def build(args: AppArgs) -> Application:
    """Make the weights present on every node, then bind the deployments. Serve runs this in a task on the cluster.

    Raises ConfigError, DownloadError, UnsupportedModel; the text becomes the application's status message.
    """
    return compose(args)


def compose(args: AppArgs, load: Loader = load_engine) -> Application:
    """`build` for any engine; benchmarks and tests bring a fake one."""
    log_to_stderr()
    if not ray.is_initialized():  # `serve run deployments.app:build model=...` builds before it starts Ray
        ray.init(namespace="serve")
    root = start_folder()
    model = str(root / args.model) if (root / args.model).exists() else args.model
    weight_dir = str((root / Path(args.weight_dir).expanduser()).absolute())
    args = args.model_copy(update={"access": args.access.settled(root)})  # from here on no key, only digests
    has = ray.cluster_resources()
    placement = place(args, int(has.get("GPU", 0)), int(has.get("CPU", 0)))
    write_error_page()
    source = ModelSource(model, args.revision, args.fallback)
    local = hydrate(source, weight_dir)
    name = local.name if args.served_name is None or local.source == "fallback" else args.served_name
    log.info("serving %s (%s) from %s on %d x %s", name, local.source, local.path, placement.replicas, placement.device)
    spec = ReplicaSpec(
        local=local,
        source=source,
        weight_dir=weight_dir,
        engine=args.engine.config(placement.device),
        name=name,
        max_queued=args.limits.max_queued_requests,
        stall_timeout_s=args.stall_timeout_s,
    )
    return bind(args, placement, spec, load)


def bind(args: AppArgs, placement: Placement, spec: ReplicaSpec, load: Loader) -> Application:
    """The two deployments. `deployments:` entries of serve_config.yaml override these options."""
    model: Any = serve.deployment(  # type: ignore[call-overload]
        ModelReplica,
        name="Model",
        num_replicas=placement.replicas,
        ray_actor_options={"num_cpus": 0.5, "num_gpus": placement.num_gpus},
        max_ongoing_requests=MAX_ONGOING,
        max_queued_requests=-1,
        graceful_shutdown_timeout_s=args.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
    )
    api = cast(Any, Api).options(
        name="Api",
        num_replicas=placement.api_replicas,
        ray_actor_options={"num_cpus": 0.5},
        graceful_shutdown_timeout_s=args.drain_timeout_s + FAREWELL_S,
        graceful_shutdown_wait_loop_s=0.5,
    )
    return api.bind(model.bind(spec, load), args, spec.local)


def start_folder() -> Path:
    """The folder that relative paths of serve_config.yaml refer to: where Serve was started.

    Workers of a local cluster run there too, with one exception: under `uv run`, Ray packs the folder and runs each
    worker in an unpacked copy (without what .gitignore lists), where ./weight would be empty and thrown away at the
    end. The copy is recognised by Ray's name for it; where Serve was started is then the folder of Ray's own daemon.
    """
    here = Path.cwd()
    if "working_dir_files" not in here.parts:
        return here
    origin = _raylet_folder() or here
    if origin != here:
        log.warning("started under `uv run`: Ray builds another environment for its workers, which takes a minute; "
                    "`.venv/bin/serve run` and `mini-llm serve` do without. Using the files of %s", origin)  # fmt: skip
    return origin if (origin / "pyproject.toml").exists() else here


def _raylet_folder() -> Path | None:
    """The working directory of the raylet that this process descends from."""
    pid = os.getppid()
    try:
        while pid > 1:
            if (Path(f"/proc/{pid}/comm")).read_text().strip() == "raylet":
                return Path(f"/proc/{pid}/cwd").resolve()
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return None
    return None
