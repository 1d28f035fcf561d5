"""The one-time weight task: before anything is deployed, every node of the cluster has the model on its disk."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from model_core.errors import DownloadError, MiniLLMError
from model_core.weights.source import LocalModel, ModelSource, ensure_weights


def hydrate(source: ModelSource, weight_dir: str) -> LocalModel:
    """Run `ensure_weights` once on every alive node, at the same time, and wait for all.

    weight_dir: a path on each node; a relative one, and a `source.model` that exists as a path here, are made absolute
    here. The task asks for no CPU, so it also starts on a full node. Ray repeats it if its worker dies (the download
    goes on where it stopped) but not if it raises. Replicas on nodes that join later call `ensure_weights` themselves.

    Raises what the first failing node raised (DownloadError, UnsupportedModel, ConfigError), with the node's address
    in front, or DownloadError if the nodes ended up with different models.
    """
    if os.path.exists(source.model):
        source = replace(source, model=os.path.abspath(source.model))
    task = ray.remote(_ensure)
    pending = {}
    for node in ray.nodes():
        if node["Alive"]:
            pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            options = task.options(num_cpus=0, max_retries=2, retry_exceptions=False, scheduling_strategy=pinned)
            pending[options.remote(source, os.path.abspath(weight_dir))] = node["NodeManagerAddress"]
    found: dict[str, LocalModel] = {}
    while pending:
        (ready,), _ = ray.wait(list(pending), num_returns=1)
        address = pending.pop(ready)
        try:
            found[address] = ray.get(ready)
        except RayError as error:
            for other in pending:
                ray.cancel(other)
            cause = error.cause if isinstance(error, RayTaskError) else error
            kind = type(cause) if isinstance(cause, MiniLLMError) else DownloadError
            raise kind(f"node {address}: {cause}") from None
    names = {model.name for model in found.values()}
    if len(names) != 1:
        listed = ", ".join(f"{address} has {model.name}" for address, model in found.items())
        raise DownloadError(f"the nodes would serve different models ({listed}): some of them cannot reach the hub; "
                            "give all of them access to it or the complete folder")
    here = ray.util.get_node_ip_address()
    return found.get(here) or next(iter(found.values()))


def _ensure(source: ModelSource, weight_dir: str) -> LocalModel:
    return ensure_weights(source, Path(weight_dir))
