"""Log-probabilities of prompts: transformers' own, however the prompt is divided, found in the cache, or computed again."""

from __future__ import annotations

import pytest
import torch

from model_core.engine.config import EngineConfig
from model_core.engine.engine import Engine
from model_core.engine.request import Request, SamplingParams
from model_core.engine.validate import MAX_PROMPT_LOGPROBS
from model_core.errors import RequestError
from model_core.weights.checkpoint import open_checkpoint
from tests.engine.served import Served

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = 8
GREEDY = dict(temperature=0.0, ignore_eos=True)
EPS = torch.finfo(torch.float32).eps


def ids(seed: int, length: int) -> list[int]:
    return torch.randint(0, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPT, OTHER = ids(1, 45), ids(2, 30)


class Scoring(Served):
    """Whom `preempting` names is preempted after each of its events."""

    preempting: str | None = None

    def __init__(self, folder, *, pages: int = 100, **config) -> None:
        kv = open_checkpoint(folder).config.kv_bytes_per_token(4) * PAGE * pages
        config = dict(max_seqs=4, max_batch_tokens=128, device="cpu", dtype="float32", threads=1) | config
        engine = Engine.load(folder, EngineConfig(page_size=PAGE, kv_cache_bytes=kv, **config))
        engine.parts.runner.kv.poison(1e30)
        super().__init__(engine)

    def hear(self, event) -> None:
        super().hear(event)
        if event.request_id == self.preempting and event.finish is None:
            self.engine.parts.scheduler.preempt(self.preempting)

    def scored(self, name: str) -> tuple[list[float], list[int], list[list[tuple[int, float]]]]:
        """Own log-probabilities, ranks, and the best (id, log-probability), of all tokens but the first."""
        parts = [event.prompt for event in self.events[name] if event.prompt is not None]
        own = [value for part in parts for value in part.own]
        best = [list(zip(part.top_ids, part.top_logprobs, strict=True)) for part in parts]
        rows = [pairs[at : at + part.count] for part, pairs in zip(parts, best, strict=True)
                for at in range(0, len(part.own) * part.count, part.count or 1)]  # fmt: skip
        return own, [rank for part in parts for rank in part.ranks], rows


@pytest.fixture
def serve(checkpoint_dirs, oracles):
    opened = []

    def open_(family: str = "llama3", **config) -> Scoring:
        opened.append(Scoring(checkpoint_dirs[family], **config))
        return opened[-1]

    yield open_
    for served in opened:
        served.close()
        assert served.engine.failure is None


def check(served: Scoring, oracle, name: str, prompt: list[int], count: int) -> None:
    own, ranks, best = served.scored(name)
    with torch.no_grad():
        logits = oracle(torch.tensor([prompt])).logits[0, :-1].float()
    wanted, bound = torch.log_softmax(logits, -1), 128 * EPS * logits.abs().max().item()
    following = torch.tensor(prompt[1:])
    assert own == pytest.approx(wanted.gather(1, following[:, None])[:, 0].tolist(), abs=bound)
    for row, token, rank in zip(wanted, prompt[1:], ranks, strict=True):
        assert int((row > row[token] + bound).sum()) < rank <= 1 + int((row > row[token] - bound).sum())
    if count:
        assert len(best) == len(prompt) - 1
        for row, pairs in zip(wanted, best, strict=True):
            assert [value for _, value in pairs] == pytest.approx(row.topk(count).values.tolist(), abs=bound)
            assert [row[token] for token, _ in pairs] == pytest.approx(row.topk(count).values.tolist(), abs=bound)


@pytest.mark.parametrize("budget", [7, 128])
def test_they_are_the_oracles(serve, oracles, family, budget):
    """Two at once, with other numbers of alternatives, beside one that asks for none; pieces of 2 * max_seqs rows."""
    served = serve(family, max_batch_tokens=budget)
    params = [dict(prompt_logprobs=3), dict(prompt_logprobs=0), dict()]
    prompts = [PROMPT, OTHER, PROMPT]
    served.ask(*(Request(name, prompt, SamplingParams(max_tokens=4, **GREEDY, **one))
                 for name, prompt, one in zip("abc", prompts, params, strict=True)))  # fmt: skip
    check(served, oracles[family], "a", PROMPT, 3)
    check(served, oracles[family], "b", OTHER, 0)
    assert served.scored("c") == ([], [], [])
    first = next(i for i, event in enumerate(served.events["a"]) if event.token_ids)
    assert all(event.prompt is None for event in served.events["a"][first:])
    assert served.tokens("a") == served.tokens("c")


def test_cached_pages_are_neither_used_nor_spoilt(serve, oracles):
    served = serve()
    plain, scoring = SamplingParams(max_tokens=6, **GREEDY), SamplingParams(max_tokens=6, prompt_logprobs=1, **GREEDY)
    for name, params in (("a", plain), ("b", scoring), ("c", plain), ("d", scoring)):
        served.ask(Request(name, PROMPT, params))
        assert served.tokens(name) == served.tokens("a")
    check(served, oracles["llama3"], "b", PROMPT, 1)
    assert served.scored("d") == served.scored("b")
    cached = {name: sum(event.cached_tokens for event in served.events[name]) for name in "abcd"}
    assert cached == {"a": 0, "b": 0, "c": 40, "d": 0}
    stats = served.engine.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (2 * len(PROMPT), 40)  # those who may not find anything do not count


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_preempted_prompt_is_scored_once(serve, oracles, prefix_cache):
    """After each of its chunks, and of its tokens."""
    served = serve(max_seqs=3, max_batch_tokens=11, prefix_cache=prefix_cache)
    served.preempting = "a"
    served.ask(Request("a", PROMPT, SamplingParams(max_tokens=4, prompt_logprobs=2, **GREEDY)))
    check(served, oracles["llama3"], "a", PROMPT, 2)
    assert served.engine.stats().preemptions >= (8 if prefix_cache else 3) and len(served.tokens("a")) == 4


def test_a_prompt_alone(serve, oracles):
    """Without an answer, as long as the context; one token has nothing before it."""
    served, longest = serve(), ids(3, 128)
    for name, prompt in (("a", longest), ("b", [7])):
        served.ask(Request(name, prompt, SamplingParams(max_tokens=0, prompt_logprobs=2, logprobs=1, temperature=0.0)))
        *_, last = served.events[name]
        assert (served.tokens(name), last.finish, last.logprobs) == ([], "length", None) and last.waits is not None
    check(served, oracles["llama3"], "a", longest, 2)
    assert served.scored("b") == ([], [], [])
    assert served.engine.stats().generation_tokens == 0  # as clients count
    with pytest.raises(RequestError, match=r"max_tokens is 0, must be at least 1 \(0 with prompt_logprobs\)"):
        served.engine.submit(Request("c", [7], SamplingParams(max_tokens=0)))
    with pytest.raises(RequestError, match="shorten the prompt to at most 127"):
        served.engine.submit(Request("c", [*longest, 1], SamplingParams(max_tokens=0, prompt_logprobs=0)))


def test_more_than_an_answer_may_hold_is_refused(serve):
    served = serve()
    for params in (dict(prompt_logprobs=101), dict(prompt_logprobs=-1)):
        with pytest.raises(RequestError, match="prompt_logprobs must be from 0 to 100"):
            served.engine.submit(Request("a", PROMPT, SamplingParams(**params)))
    with pytest.raises(RequestError, match=f"at most {MAX_PROMPT_LOGPROBS} are possible: ask for fewer"):
        served.engine.submit(Request("a", [1] * (MAX_PROMPT_LOGPROBS // 3 + 1), SamplingParams(prompt_logprobs=2)))


def test_logits_that_are_not_numbers_end_the_request_alone(serve, oracles):
    served = serve(max_batch_tokens=8)
    head = served.engine.parts.runner.model.logits
    poisoned = [True]

    def logits(hidden):
        found = head(hidden)
        if poisoned and len(hidden) > 3:
            poisoned.clear()
            found[2, 0] = torch.nan
        return found

    served.engine.parts.runner.model.logits = logits
    served.ask(Request("a", PROMPT, SamplingParams(max_tokens=4, prompt_logprobs=0, **GREEDY)))
    assert served.events["a"][-1].finish == "error" and "not finite" in served.events["a"][-1].error
    served.ask(Request("b", PROMPT, SamplingParams(max_tokens=4, prompt_logprobs=0, **GREEDY)))
    check(served, oracles["llama3"], "b", PROMPT, 0)
