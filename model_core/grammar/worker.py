"""The process that compiles grammars for compiler.py: it may take too long or too much memory, and is ended then.

It imports neither torch nor the engine. On its pipes are pickles: the vocabulary first, then a spec each, answered by what
`Compiled.packed` gave or by the RequestError.
"""

from __future__ import annotations

import os
import pickle
import sys
from contextlib import suppress

MEMORY = 4 << 30  # of address space, in bytes


def work(threads: int) -> None:
    sys.modules["torch"] = None  # type: ignore[assignment]  # the binding would import it only because it is there
    from model_core.errors import RequestError
    from model_core.grammar.matcher import Compiled, Vocabulary

    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with suppress(OSError, AttributeError):
        os.nice(10)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the library prints shall not be taken for an answer
    vocabulary = Vocabulary(*pickle.load(sys.stdin.buffer))
    while True:
        try:
            spec = pickle.load(sys.stdin.buffer)
        except EOFError:  # nobody is left to ask
            return
        answer: str | tuple[str, str | None, str | None]
        try:
            answer = Compiled.of(spec, vocabulary, threads).packed()
        except RequestError as error:
            answer = str(error), error.param, error.code
        pickle.dump(answer, answers)
        answers.flush()
