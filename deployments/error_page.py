"""HAProxy's answer for a replica that is gone, in the envelope of all other errors."""

from __future__ import annotations

import logging
from http import HTTPStatus
from pathlib import Path

import ray

from deployments.protocol.errors import ApiError, replica_lost

log = logging.getLogger("mini_llm.app")


def page(error: ApiError) -> bytes:
    """A whole HTTP response."""
    body = error.body()
    headers = {**error.headers, "content-type": "application/json", "content-length": len(body), "cache-control": "no-cache"}
    first = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"
    lines = [first, *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode() + body


def write_error_page() -> None:
    """Put our page in the place of Ray Serve's (bare text, status 500), which HAProxy reads again with each change of replicas.

    An HTTP replica that died takes its sequences along, so that a client may ask again.
    Where Serve wrote none there is nothing to do: another proxy, or one on another machine.
    """
    from ray.serve._private.constants import RAY_SERVE_HAPROXY_CONFIG_FILE_LOC  # set by an environment variable of this name

    # where ray/serve/_private/haproxy.py of 2.60, which is pinned, writes it
    path = Path(RAY_SERVE_HAPROXY_CONFIG_FILE_LOC).parent / ray.get_runtime_context().get_node_id() / "500.http"
    if not path.exists():
        return
    try:
        path.write_bytes(page(replica_lost(started=False)))
    except OSError as error:
        log.warning("HAProxy keeps its own error page: %s", error)
