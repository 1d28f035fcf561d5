"""What the memory of a server's replicas is used for, asked of themselves: in use, or kept by the allocator for later."""

from __future__ import annotations

import ctypes
import gc
import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.server import Server

_SCRIPT = """
import json, sys
import ray
from ray.util import list_named_actors
from benchmarks.heap import held
ray.init(address=sys.argv[1], namespace="serve", log_to_driver=False, configure_logging=False)
for line in sys.stdin:
    found = {}
    for name in sorted(actor["name"] for actor in list_named_actors(all_namespaces=True)):
        if name.startswith("SERVE_REPLICA::"):
            replica = ray.get_actor(name, namespace="serve")
            part = name.split("#")[1].lower()
            found[part] = ray.get(replica.__ray_call__.remote(lambda self, trim: held(trim), json.loads(line)))
    print(json.dumps(found), flush=True)
"""


class _MallInfo2(ctypes.Structure):
    """glibc's struct mallinfo2, bytes and counts of all arenas."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks",
                                                     "uordblks", "fordblks", "keepcost")]  # fmt: skip


def held(trim: bool = False) -> dict[str, float]:
    """Of this process, in MiB, after a full collection of garbage: resident_mib, and its own pages that are resident;
    used_mib: given out by malloc; free_mib: kept by malloc for later; blocks: objects of Python's own allocator (a count).

    trim: give what malloc keeps back to the system first; slow, so at the end.
    """
    gc.collect()
    libc = ctypes.CDLL("libc.so.6")
    if trim:
        libc.malloc_trim(0)
    libc.mallinfo2.restype = _MallInfo2
    info = libc.mallinfo2()
    [kib] = re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    mib = 1 << 20
    return {"resident_mib": int(kib) / 1024, "used_mib": (info.uordblks + info.hblkhd) / mib, "free_mib": info.fordblks / mib,
            "blocks": sys.getallocatedblocks()}  # fmt: skip


class Heaps:
    """Asks all replicas of a server, which must be silent. A driver in the cluster does it, for as long as this lives."""

    def __init__(self, server: Server) -> None:
        self._asker = server.watch(_SCRIPT)

    def ask(self, trim: bool = False) -> dict[str, dict[str, Any]]:
        """deployment, in lower case → held() of its replica."""
        assert self._asker.stdin is not None and self._asker.stdout is not None
        self._asker.stdin.write(json.dumps(trim) + "\n")
        self._asker.stdin.flush()
        return json.loads(self._asker.stdout.readline())

    def close(self) -> None:
        self._asker.kill()
        self._asker.communicate()
