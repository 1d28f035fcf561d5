"""The process that compiles grammars for compiler.py: it may take too long or too much memory, and is ended then.

It imports neither torch nor the engine. On its pipes are pickles: the vocabulary first, then a spec each, answered by what
`Compiled.packed` gave or by the RequestError.
"""

from __future__ import annotations

import os
import pickle
import random
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model_core.grammar.matcher import Compiled, Packed, Vocabulary

MEMORY = 4 << 30  # of address space, in bytes
MEAN_MS, MOST_MS = 8.0, 150.0  # of CPU time for one mask
_WALKS, _STEPS = 3, 40


def walks(compiled: Compiled, vocabulary: Vocabulary) -> list[float]:
    """How long masks take on a few walks at random, in ms, until one takes too long."""
    import numpy as np

    from model_core.grammar.matcher import Matcher

    masks = np.zeros((1, vocabulary.words), dtype=np.int32)
    spent: list[float] = []
    ends = frozenset(vocabulary.eos_ids or (0,))  # a matcher must have some
    for walk in range(_WALKS):
        chance, matcher, output = random.Random(walk), Matcher(compiled, ends), list[int]()
        for _ in range(_STEPS):
            began = time.thread_time()
            matcher.follow(output)
            matcher.fill(masks, 0)
            spent.append(1e3 * (time.thread_time() - began))
            if spent[-1] > MOST_MS:
                return spent
            ids = np.flatnonzero(np.unpackbits(masks.view(np.uint8)[0], bitorder="little")[: vocabulary.size])
            if not len(ids) or (token := int(chance.choice(ids))) in ends:
                break
            output.append(token)
    return spent


def too_slow(spent: list[float]) -> str | None:
    """How long masks take, if that is too long: of ambiguous repetitions one can take seconds."""
    longest, mean = max(spent), sum(spent) / len(spent)
    return f"{longest:.0f} ms" if longest > MOST_MS else f"{mean:.0f} ms" if mean > MEAN_MS else None


def work(threads: int) -> None:
    sys.modules["torch"] = None  # type: ignore[assignment]  # the binding would import it only because it is there
    from model_core.errors import RequestError
    from model_core.grammar.compiler import TOO_COMPLEX
    from model_core.grammar.matcher import Compiled, Vocabulary

    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the library prints shall not be taken for an answer
    vocabulary = Vocabulary(*pickle.load(sys.stdin.buffer))
    while True:
        try:
            spec = pickle.load(sys.stdin.buffer)
        except EOFError:  # nobody is left to ask
            return
        answer: Packed | tuple[str, str | None, str | None]
        try:
            compiled = Compiled.of(spec, vocabulary, threads)
            if (long := too_slow(walks(compiled, vocabulary))) is not None:
                message = f"'{spec.param}' makes a grammar that takes {long} a token to follow: repeat less in what is repeated"
                raise RequestError(message, param=spec.param, code=TOO_COMPLEX)
            answer = compiled.packed()
        except RequestError as error:
            answer = str(error), error.param, error.code
        pickle.dump(answer, answers)
        answers.flush()
