"""Compiled grammars of an engine: made in a process of their own, within bounds, and kept while they are in use."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from model_core.errors import MiniLLMError, RequestError
from model_core.grammar.spec import BUSY, GrammarSpec

if TYPE_CHECKING:
    from model_core.grammar.matcher import Compiled, Vocabulary

logger = logging.getLogger("mini_llm.grammar")

TIMEOUT_S = 30.0
CACHE_BYTES, CACHE_COUNT = 256 << 20, 256
TOO_COMPLEX = "grammar_too_complex"


class Compiler:
    """Thread-safe. Nothing is imported, loaded or started before the first grammar comes, or `prepare` is called.

    load: the tokens of the model; what it raises is told to the client. timeout_s: for one grammar, in seconds; another one may
    wait as long for its turn. cache_bytes, cache_count: of compiled grammars, of which the one used longest ago goes first.
    """

    def __init__(self, load: Callable[[], Vocabulary], *, timeout_s: float = TIMEOUT_S, cache_bytes: int = CACHE_BYTES,
                 cache_count: int = CACHE_COUNT) -> None:  # fmt: skip
        self._load, self._timeout_s = load, timeout_s
        self._cache_bytes, self._cache_count = cache_bytes, cache_count
        self._cache: OrderedDict[tuple[str, tuple[int, ...]], Compiled] = OrderedDict()
        self._lock = threading.Lock()  # for the cache
        self._turn = threading.Lock()  # for all else
        self._vocabulary: Vocabulary | None = None
        self._worker: subprocess.Popen[bytes] | None = None

    def get(self, spec: GrammarSpec) -> Compiled:
        """Blocks while it compiles; one that is kept comes at once. Raises RequestError."""
        if (found := self._kept(spec)) is not None:
            return found
        if not self._turn.acquire(timeout=self._timeout_s):
            raise RequestError(f"other grammars have kept the compiler busy for {self._timeout_s:g} s: try again later",
                               param=spec.param, code=BUSY)  # fmt: skip
        try:
            if (found := self._kept(spec)) is None:
                found = self._compile(spec)
                self._keep(spec, found)
            return found
        finally:
            self._turn.release()

    def prepare(self) -> None:
        """Load what the first grammar needs, for which else all who are served then wait: Python does nothing else meanwhile,
        0.3 s for 49k tokens. What goes wrong is told to whoever brings a grammar."""
        with self._turn, suppress(MiniLLMError, ImportError):
            self._known()

    def close(self) -> None:
        """End the process; a grammar that is being compiled is refused."""
        worker = self._worker
        if worker is not None:
            worker.kill()

    def _kept(self, spec: GrammarSpec) -> Compiled | None:
        with self._lock:
            key = spec.text, spec.marks
            if key in self._cache:
                self._cache.move_to_end(key)
            return self._cache.get(key)

    def _keep(self, spec: GrammarSpec, compiled: Compiled) -> None:
        with self._lock:
            self._cache[spec.text, spec.marks] = compiled
            total = sum(one.nbytes for one in self._cache.values())
            while len(self._cache) > self._cache_count or (total > self._cache_bytes and len(self._cache) > 1):
                total -= self._cache.popitem(last=False)[1].nbytes

    def _known(self) -> Vocabulary:
        if self._vocabulary is None:
            self._vocabulary = self._load()
        return self._vocabulary

    def _compile(self, spec: GrammarSpec) -> Compiled:
        from model_core.grammar.matcher import Compiled, Packed

        try:
            vocabulary = self._known()
        except MiniLLMError as error:
            raise RequestError(f"this model's output cannot be constrained: {error}", param=spec.param,
                               code="unsupported_parameter") from error  # fmt: skip
        if self._worker is None or self._worker.poll() is not None:
            self._worker = _start(vocabulary)
        answer = self._ask(self._worker, spec)
        if isinstance(answer, Packed):
            return Compiled.unpacked(answer, vocabulary.marked(spec.marks))
        message, param, code = answer
        raise RequestError(message, param=param, code=code)

    def _ask(self, worker: subprocess.Popen[bytes], spec: GrammarSpec) -> Any:
        assert worker.stdin is not None and worker.stdout is not None
        timer = threading.Timer(self._timeout_s, worker.kill)
        timer.start()
        try:
            pickle.dump(spec, worker.stdin)
            worker.stdin.flush()
            return pickle.load(worker.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            late = timer.finished.is_set()
            worker.kill()
            why = f"more than {self._timeout_s:g} s" if late else "too much memory"
            logger.warning("a grammar of %d characters took its compiler %s (status %s)", len(spec.text), why, worker.wait())
            raise RequestError(f"'{spec.param}' takes {why} to compile: make it simpler, or its repetitions smaller",
                               param=spec.param, code=TOO_COMPLEX) from None  # fmt: skip
        finally:
            timer.cancel()


def _start(vocabulary: Vocabulary) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    env = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": ""}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    work = f"from model_core.grammar.worker import work; work({max(1, min(8, cores // 2))})"
    command = [sys.executable, "-c", f"import os; hasattr(os, 'nice') and os.nice(10); {work}"]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
    assert worker.stdin is not None
    pickle.dump((vocabulary.tokens, vocabulary.size, vocabulary.eos_ids), worker.stdin)
    return worker
