"""HAProxy's answer for a replica that is gone, in the envelope of all other errors."""

from __future__ import annotations

import logging
from pathlib import Path

import ray

from deployments.protocol.errors import replica_lost

log = logging.getLogger("mini_llm.app")


def error_page() -> bytes:
    """A whole HTTP response. An HTTP replica that died takes its sequences along, so that a client may ask again."""
    error = replica_lost(started=False)
    body = error.body()
    headers = {**error.headers, "content-type": "application/json", "content-length": len(body), "cache-control": "no-cache"}
    lines = [f"HTTP/1.1 {error.status} Service Unavailable", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode() + body


def write_error_page() -> None:
    """Put our page in the place of Ray Serve's (bare text, status 500), which HAProxy reads again with each change of replicas.

    Where Serve wrote none there is nothing to do: another proxy, or one on another machine.
    """
    from ray.serve._private.constants import RAY_SERVE_HAPROXY_CONFIG_FILE_LOC  # set by an environment variable of this name

    # where ray/serve/_private/haproxy.py of 2.60, which is pinned, writes it
    page = Path(RAY_SERVE_HAPROXY_CONFIG_FILE_LOC).parent / ray.get_runtime_context().get_node_id() / "500.http"
    if not page.exists():
        return
    try:
        page.write_bytes(error_page())
    except OSError as error:
        log.warning("HAProxy keeps its own error page: %s", error)
