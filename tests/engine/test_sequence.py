"""When a sequence ends, and its invariants."""

import pytest

from model_core.engine.request import Request, SamplingParams
from model_core.engine.sequence import Sequence, State

EOS = frozenset({2})


def after(outputs: list[int], **params) -> Sequence:
    seq = Sequence.of(Request("a", [5, 2, 5], SamplingParams(**params)), arrival=0, eos_ids=EOS)
    seq.tokens += outputs
    return seq


@pytest.mark.parametrize("outputs, params, reason", [
    ([7], {}, None),
    ([7] * 16, {}, "length"),
    ([7, 2], {}, "stop"),
    ([7, 2], {"ignore_eos": True}, None),
    ([7, 2], {"ignore_eos": True, "stop_ids": (2,)}, "stop"),
    ([7, 9], {"stop_ids": (9,)}, "stop"),
    ([9, 2], {"stop_ids": (9,)}, "stop"),
    ([7, 2], {"min_tokens": 3}, None),
    ([7, 2, 2], {"min_tokens": 3}, "stop"),
    ([7, 2], {"max_tokens": 2}, "stop"),
    ([2, 7], {"max_tokens": 2, "min_tokens": 2}, "length"),
])
def test_end(outputs, params, reason) -> None:
    assert after(outputs, **params).ends() == reason


def test_the_prompt_does_not_end_it() -> None:
    seq = Sequence.of(Request("a", [5, 2]), arrival=0, eos_ids=EOS)
    assert seq.ends() is None


def test_new_sequence_is_a_copy_of_the_prompt_that_waits() -> None:
    request = Request("a", [1, 2, 3], SamplingParams(max_tokens=4), priority=-1)
    seq = Sequence.of(request, arrival=6)
    seq.tokens.append(9)
    assert request.prompt_ids == [1, 2, 3] and seq.num_output == 1
    assert (seq.num_prompt, seq.limit, seq.computed, seq.state, seq.slot) == (3, 7, 0, State.WAITING, None)
    assert seq.rank == (-1, 6) and seq.request_id == "a"


@pytest.mark.parametrize("damage", [{"computed": 3}, {"total": 30}, {"total": 2}, {"slot": 0}, {"block_table": [1]}])
def test_check_finds_damage(damage) -> None:
    seq = after([])
    seq.check(page_size=4)
    for name, value in damage.items():
        setattr(seq, name, value)
    with pytest.raises(AssertionError):
        seq.check(page_size=4)
