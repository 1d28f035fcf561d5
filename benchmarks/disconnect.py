"""Client gone → pages free: the milliseconds between closing streaming connections and the engine's pages being free.

    python -m benchmarks.disconnect [--streams 8] [--rounds 10]

Everything is real: HAProxy, Api, the model replica, SmolLM2 decoding. A second process then polls the replica's page counts
through a Serve handle, so a figure includes one such poll (reported as poll_ms). Written to
benchmarks/results/<device>/disconnect.json.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import sys
import time
from pathlib import Path

from benchmarks.report import write_report
from benchmarks.server import ROOT, Server, serving

WATCH = """
import json, sys, time
import ray
from ray import serve
ray.init(address=sys.argv[1], namespace="serve", log_to_driver=False)
model = serve.get_deployment_handle("Model", "llm")
print(json.dumps(vars(model.stats.remote().result())), flush=True)
for line in sys.stdin:
    while True:
        asked = time.time()
        stats = model.stats.remote().result()
        used = stats.pages_total - stats.pages_free - stats.pages_cached
        if line.strip() == "now" or used == stats.running == 0:
            break
        time.sleep(0.002)
    print(json.dumps([asked, time.time(), used, stats.running, stats.step_ms]), flush=True)
"""


class Watch:
    """A process that reads the engine's page counts when asked; it asks nothing while streams run undisturbed."""

    def __init__(self, server: Server) -> None:
        self.process = server.watch(WATCH)
        self._read()

    def now(self) -> tuple[float, float, int, int, float]:
        """(asked at, answered at, pages used, sequences running, milliseconds of the last step)"""
        return self._ask("now")

    def until_free(self) -> tuple[float, float, int, int, float]:
        """The first reading in which no page is used."""
        return self._ask("free")

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _ask(self, what: str) -> tuple[float, float, int, int, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        asked, answered, used, running, step_ms = self._read()
        return asked, answered, int(used), int(running), step_ms

    def _read(self) -> list[float]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())


def one_round(server: Server, watch: Watch, streams: int) -> tuple[float, float, float]:
    """Milliseconds until the pages are free, of the poll that saw it, and of the last step before."""
    sockets = [open_stream(server.port, index) for index in range(streams)]
    time.sleep(0.5)
    _, _, used, running, step_ms = watch.now()
    assert used > 0 and running == streams
    time.sleep(0.3)
    left = time.time()
    for connection in sockets:
        connection.close()
    asked, answered, *_ = watch.until_free()
    return 1e3 * (answered - left), 1e3 * (answered - asked), step_ms


def open_stream(port: int, index: int) -> socket.socket:
    """A connection on which an endless answer has begun."""
    body = json.dumps({"messages": [{"role": "user", "content": f"Write a long essay about the number {index}."}],
                       "stream": True, "max_tokens": 4000, "ignore_eos": True}).encode()  # fmt: skip
    connection = socket.create_connection(("127.0.0.1", port), 60)
    connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
                       b"content-length: %d\r\n\r\n%b" % (len(body), body))  # fmt: skip
    while b'"content":' not in connection.recv(65536):
        pass
    return connection


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with serving({"weight_dir": str(ROOT / "weight")}) as server:
        watch = Watch(server)
        rounds = []
        try:
            for number in range(options.rounds):
                rounds.append(one_round(server, watch, options.streams))
                print("round {}: free after {:.1f} ms (poll {:.1f} ms, step {:.1f} ms)".format(number + 1, *rounds[-1]),
                      file=sys.stderr)  # fmt: skip
        finally:
            watch.close()
    free, poll, step = ([row[column] for row in rounds] for column in range(3))
    print(f"pages free after {statistics.median(free):.1f} ms (median of {len(free)}, worst {max(free):.1f})")
    print(write_report("disconnect", [{
        "model": "SmolLM2-135M-Instruct", "streams": options.streams, "rounds": len(free),
        "free_ms_median": round(statistics.median(free), 1), "free_ms_max": round(max(free), 1),
        "poll_ms_median": round(statistics.median(poll), 1), "step_ms_median": round(statistics.median(step), 1),
    }], out=options.out))  # fmt: skip


if __name__ == "__main__":
    main()
