"""What the host writes into a slot when a sequence takes it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model_core.engine.request import Request, SamplingParams
from model_core.engine.rules import SlotRules, rules_of
from model_core.engine.sequence import Sequence
from model_core.kernels.decode import state as at
from model_core.kernels.decode.state import DecodeState

VOCAB = 40
NONE: frozenset[int] = frozenset()


@pytest.fixture
def rules() -> SlotRules:
    return SlotRules(DecodeState.empty(2, 1, "cpu", torch.zeros((2, VOCAB), dtype=torch.int32)), VOCAB)


def sequence(slot: int = 1, output: tuple[int, ...] = (), **params) -> Sequence:
    params = {"stop_ids": (3,), "ignore_eos": True} | params
    found = Sequence.of(Request("r", [1, 2, 2], SamplingParams(**params)), 0)
    found.slot, found.tokens = slot, [1, 2, 2, *output]
    return found


@pytest.mark.parametrize("params", [dict(), dict(temperature=0.0, top_k=5, top_p=0.5, min_p=0.5), dict(top_k=VOCAB),
                                    dict(top_k=-1), dict(max_tokens=9, stop_ids=(3,))], ids=str)  # fmt: skip
def test_what_changes_nothing_is_no_rule(params):
    assert rules_of(SamplingParams(**params), frozenset((3,)), 3, VOCAB) is None
    assert rules_of(SamplingParams(min_tokens=9), NONE, 3, VOCAB) is None


def test_a_row_says_what_was_asked_for():
    params = SamplingParams(temperature=0.5, top_k=7, top_p=0.25, min_p=1.0, logit_bias={9: -2.0, 4: 1.5}, presence_penalty=0.5,
                            frequency_penalty=-0.25, repetition_penalty=1.5, min_tokens=9)  # fmt: skip
    row = rules_of(params, frozenset((8, 3)), 5, VOCAB)
    assert row is not None and row.dtype == np.int32 and len(row) == at.RULES
    numbers = row.view(np.float32)
    assert row[:5].tolist() == [63, 2, 2, 7, 14]
    assert numbers[5:10].tolist() == [0.25, 0.0, 1.5, 0.5, -0.25]
    assert row[at.STOP_IDS :][:3].tolist() == [3, 8, 0]
    assert row[at.BIAS_IDS :][:3].tolist() == [9, 4, 0] and numbers[at.BIAS_VALUES :][:3].tolist() == [-2.0, 1.5, 0.0]


def test_a_grammar_is_a_rule_by_itself():
    row = rules_of(SamplingParams(), NONE, 3, VOCAB, held=True)
    assert row is not None and row[0] == at.HELD and not row[1:].any()


def test_the_longest_lists_fit():
    ids = list(range(at.MAX_LOGIT_BIAS))
    row = rules_of(SamplingParams(logit_bias=dict.fromkeys(ids, 1.0), min_tokens=1), frozenset(ids[: at.MAX_STOPS]), 3, 1000)
    assert row is not None and row[at.BIAS_IDS : at.BIAS_VALUES].tolist() == ids
    assert row[at.STOP_IDS : at.BIAS_IDS].tolist() == ids[: at.MAX_STOPS]
    assert (row.view(np.float32)[at.BIAS_VALUES :] == 1).all()


def test_a_sequence_that_resumes_brings_its_counts(rules):
    assert rules.assign(sequence(output=(2, 7, 7), frequency_penalty=1.0, min_tokens=9))
    assert {token: count for token, count in enumerate(rules.state.counts[1].tolist()) if count} == {1: 1, 2: 3, 7: 4}
    assert rules.state.rules[1, at.FIRST_STOP] == 12  # from the prompt on
    assert not rules.state.rules[[0, 2]].any() and not rules.state.counts[0].any()


def test_who_follows_in_a_slot_finds_nothing_of_it(rules):
    assert rules.assign(sequence(top_k=5, logit_bias={1: 1.0}))
    assert rules.assign(sequence(top_p=0.5))
    assert rules.state.rules[1].nonzero()[:, 0].tolist() == [0, at.WANTED_P] and rules.edited == {1}
    assert rules.assign(sequence())
    assert not rules.state.rules.any() and not rules.ruled and not rules.edited


@pytest.mark.parametrize("params", [dict(logprobs=0), dict(min_tokens=1, stop_ids=range(at.MAX_STOPS + 1))], ids=str)
def test_what_graphs_cannot_do_is_left_to_the_sampler(rules, params):
    assert rules.assign(sequence(top_k=5))
    assert not rules.assign(sequence(top_k=5, frequency_penalty=1.0, **params))
    assert not rules.state.rules.any() and not rules.state.counts.any()
