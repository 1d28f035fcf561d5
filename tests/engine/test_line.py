"""The waiting line against a sorted list."""

import random

import pytest

from model_core.engine.line import Line
from model_core.engine.request import Request
from model_core.engine.sequence import Sequence


def sequence(arrival: int, priority: int = 0) -> Sequence:
    return Sequence.of(Request(str(arrival), [1], priority=priority), arrival)


def leave(line: Line, seq: Sequence) -> None:
    seq.finish = "abort"
    line.left()


@pytest.mark.parametrize("seed", range(20))
def test_the_head_is_the_lowest_rank_of_those_that_wait(seed: int) -> None:
    draw, line, waiting = random.Random(seed), Line(), list[Sequence]()
    for arrival in range(500):
        chance = draw.random()
        if chance < 0.5:
            waiting.append(sequence(arrival, draw.randint(-1, 1)))
            line.push(waiting[-1])
        elif chance < 0.8 and waiting:
            leave(line, waiting.pop(draw.randrange(len(waiting))))
        elif (head := line.head()) is not None:
            line.pop()
            waiting.remove(head)
        line.check(waiting)
        assert len(line) == len(waiting)
        assert line.head() is min(waiting, key=lambda seq: seq.rank, default=None)


def test_finished_ones_behind_a_head_that_waits_are_forgotten() -> None:
    line, first = Line(), sequence(0)
    line.push(first)
    for arrival in range(1, 1000):
        seq = sequence(arrival)
        line.push(seq)
        leave(line, seq)
    assert len(line._heap) < 100 and len(line) == 1 and line.head() is first


def test_an_empty_line_has_no_head() -> None:
    line, seq = Line(), sequence(0)
    assert line.head() is None and len(line) == 0
    line.push(seq)
    leave(line, seq)
    assert line.head() is None and len(line) == 0
    line.check([])
