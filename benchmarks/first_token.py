"""A fresh process of benchmarks/engine_startup.py: load an engine, generate one token, print when, as a line of JSON.

Nothing that the engine does not import is imported before it is ready.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time


def main() -> None:
    """argv: the model folder, EngineConfig as JSON, and whether there is a head start (0 or 1)."""
    folder, settings, early = sys.argv[1:]
    if early == "1":
        from model_core import head_start

        head_start.begin()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from model_core.engine.config import EngineConfig
    from model_core.engine.engine import Engine
    from model_core.engine.request import Request, SamplingParams, TokenEvent

    engine = Engine.load(folder, EngineConfig(**json.loads(settings)))
    ready, done, first = time.time(), threading.Event(), []

    def on_step(events: list[TokenEvent]) -> None:
        first.extend(events)
        done.set()

    engine.start(on_step)
    engine.submit(Request("first", [1, 2, 3], SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)))
    if not done.wait(120):
        raise RuntimeError(f"no token after 120 s: {engine.stage} {engine.failure}")
    token = time.time()
    if not first[0].token_ids:
        raise RuntimeError(f"the first request failed: {first[0]}")
    steps = [(step.name, step.began, step.ended, step.note) for step in engine.parts.startup.steps]
    print(json.dumps({"ready": ready, "token": token, "steps": steps, "device": engine.info.device}), flush=True)
    engine.shutdown()


if __name__ == "__main__":
    main()
