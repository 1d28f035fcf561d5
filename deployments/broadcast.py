"""One question to all replicas of a deployment, and the number of the one that answers."""

from __future__ import annotations

from typing import Any, TypeVar

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

TIMEOUT_S = 1.5

T = TypeVar("T")


async def answers_of(deployment: Any, method: str, kind: type[T]) -> list[T]:
    """deployment: a handle. What `method` returns in each replica that answers in time, and with a `kind`."""
    try:
        found = await deployment.broadcast(method).results_async(timeout_s=TIMEOUT_S, return_exceptions=True)
    except (RayError, RayServeException, TimeoutError):
        found = []
    return [one for one in found if isinstance(one, kind)]


def rank() -> int:
    """This replica's number, which Serve gives to the one that replaces it, too; 0 without Serve."""
    try:
        return serve.get_replica_context().rank.rank
    except RayServeException:
        return 0
