"""An application whose engine never starts, for the launcher's tests."""

# No `from __future__ import annotations`: Serve reads the builder's annotation and wants the class, not its name.

from typing import Any

from deployments.replica import EngineLike, ReplicaSpec
from deployments.settings import AppArgs
from model_core.errors import EngineDead


def load(spec: ReplicaSpec) -> EngineLike:
    raise EngineDead("this engine never starts:\nset broken to false")


def build(args: AppArgs) -> Any:
    from deployments.app import compose

    return compose(args, load)
