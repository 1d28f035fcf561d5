"""What Ray and Serve say of an application that starts, cut to what a person needs of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_FRAME = re.compile(r'^\s+File ".*", line \d+')
# Of Ray's own processes only this is worth a person's attention while a model starts.
_TROUBLE = re.compile(r" (WARNING|ERROR) |out of memory|OOM|running low|out of disk|infeasible|cannot be scheduled")


def print_worker_lines(data: Mapping[str, Any], ignore_prefix: bool = False) -> None:
    """Lines of one process of the cluster, as Ray hands them to its driver: ours as they are, Ray's own if they matter.

    ignore_prefix: whether the name of the process is to be left out.
    """
    name = str(data.get("actor_name") or data.get("task_name") or data.get("pid"))
    ours = name.startswith(("ServeReplica:", "_ensure", "build_serve_application"))
    label = "weights" if name == "_ensure" else "build" if ours and ":" not in name else name.rpartition(":")[2]
    for line in data["lines"]:
        if ours or _TROUBLE.search(line):
            print(line if ignore_prefix else f"{label} | {line}", flush=True)


def explain_failure(name: str, app: Any) -> str:
    """What Serve knows about a failed application: the exceptions at the ends of its tracebacks."""
    parts = [f"{name}: {condense(app.message)}"] if app.message else []
    for part, deployment in app.deployments.items():
        if deployment.message and deployment.status not in ("HEALTHY", "UPDATING"):
            parts.append(f"{name}/{part}: {condense(deployment.message)}")
    return "\n".join(parts) or f"{name}: {app.status}"


def condense(message: str) -> str:
    """The exception at the end of a traceback, with all lines of its text; a message without traceback as it is."""
    lines = message.strip().splitlines()
    frames = [index for index, line in enumerate(lines) if _FRAME.match(line)]
    if frames:
        for index in range(frames[-1] + 1, len(lines)):
            if lines[index][:1].strip():
                return "\n".join(lines[index:])
    return message.strip()
