"""The forward pass against transformers: every family, and every way an engine may cut up the same tokens."""

from __future__ import annotations

import pytest
import torch

PAGE = 8
EPS = torch.finfo(torch.float32).eps
BF16_EPS = torch.finfo(torch.bfloat16).eps


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(0, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def expected(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens])).logits[0].float()


def worst(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest error relative to the largest logit."""
    assert found.shape == wanted.shape and found.isfinite().all()
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


# Rounding of three layers in another order of summation; measured over all families: 2 to 21 eps.
BOUND = 64 * EPS


def test_whole_prompt(open_session, oracles, family):
    session, tokens = open_session(family), ids(45, 1)
    (logits,) = session.step([(session.add(tokens), 45)])
    assert logits.dtype == torch.float32
    assert worst(logits, expected(oracles[family], tokens)) <= BOUND


@pytest.mark.parametrize("chunks", [[1] * 45, [7, 1, 16, 8, 13], [32, 13], [44, 1]], ids=str)
def test_chunked_prompt(open_session, oracles, family, chunks):
    session, tokens = open_session(family), ids(45, 2)
    sequence = session.add(tokens)
    logits = torch.cat([session.step([(sequence, chunk)])[0] for chunk in chunks])
    assert worst(logits, expected(oracles[family], tokens)) <= BOUND


def test_prefix_hit(open_session, oracles, family):
    session, first = open_session(family), ids(37, 3)
    second = first[: 3 * PAGE] + ids(20, 4)
    donor = session.add(first)
    session.step([(donor, 37)])
    heir = session.add(second, shared=donor, shared_pages=3)
    (logits,) = session.step([(heir, len(second) - 3 * PAGE)])
    assert worst(logits, expected(oracles[family], second)[3 * PAGE :]) <= BOUND
    assert donor.pages[:3] == heir.pages[:3] and not set(donor.pages[3:]) & set(heir.pages)


def test_batch_of_decodes_and_chunks(open_session, oracles, family):
    """Two decodes, a later chunk of a prompt and a whole prompt in one step; order of arrival mixed."""
    session, lengths = open_session(family), (19, 41, 33, 26)
    prompts = [ids(length, 10 + length) for length in lengths]
    sequences = [session.add(prompt) for prompt in prompts]
    session.step([(sequences[0], 18), (sequences[1], 40), (sequences[2], 9)])
    parts = session.step([(sequences[3], 26), (sequences[1], 1), (sequences[2], 24), (sequences[0], 1)])
    for index, part in zip((3, 1, 2, 0), parts, strict=True):
        wanted = expected(oracles[family], prompts[index])
        assert worst(part, wanted[-part.shape[0] :]) <= BOUND


def test_logit_rows_select(open_session, monkeypatch):
    """Only the rows asked for are multiplied by the head, in the order asked."""
    session, tokens = open_session("llama2"), ids(21, 5)
    forward = session.model.forward
    (every,) = session.step([(session.add(tokens), 21)])

    def some(batch, kv):
        batch.logit_rows = torch.tensor([20, 3])
        return forward(batch, kv)[torch.tensor([0, 1] + [1] * 19)]

    monkeypatch.setattr(session.model, "forward", some)
    (picked,) = session.step([(session.add(tokens), 21)])
    assert worst(picked[:2], every[[20, 3]]) <= 4 * EPS


def test_greedy_ids_equal(open_session, oracles, family):
    """32 tokens of two sequences decoded together, each against transformers alone."""
    session, prompts = open_session(family), [ids(17, 6), ids(30, 7)]
    sequences = [session.add(prompt) for prompt in prompts]
    parts = session.step([(sequence, len(sequence.ids)) for sequence in sequences])
    for _ in range(32):
        for sequence, part in zip(sequences, parts, strict=True):
            sequence.ids.append(int(part[-1].argmax()))
        parts = session.step([(sequence, 1) for sequence in sequences])
    for sequence, prompt in zip(sequences, prompts, strict=True):
        with torch.no_grad():
            wanted = oracles[family].generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)),
                                              max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert sequence.ids == wanted[0].tolist()


def rounded(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """A float32 copy of the model whose weights are numbers of `dtype`."""
    import copy

    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data = parameter.data.to(dtype).float()
    return twin


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_weights_compute_in_float32_on_the_cpu(open_session, oracles, family, dtype):
    """Panels hold 16-bit weights exactly, so the result is float32's for those weights, not 16-bit arithmetic's."""
    session, tokens = open_session(family, dtype=dtype), ids(45, 8)
    if session.model.dtype != torch.float32:
        pytest.skip("this CPU has no packed half-precision product")
    (logits,) = session.step([(session.add(tokens), 45)])
    assert worst(logits, expected(rounded(oracles[family], dtype), tokens)) <= BOUND


def test_bfloat16_cache_costs_its_own_rounding_only(open_session, oracles, family):
    session, tokens = open_session(family, kv_dtype=torch.bfloat16), ids(45, 9)
    (logits,) = session.step([(session.add(tokens), 45)])
    assert worst(logits, expected(oracles[family], tokens)) <= 12 * BF16_EPS


def test_bfloat16_arithmetic_is_no_worse_than_transformers(open_session, oracles, family, monkeypatch):
    """The path of a GPU (weights, activations and cache bfloat16), against float32 with the same weights."""
    monkeypatch.setattr("model_core.kernels.linear.packing_works", lambda: False)
    session, tokens = open_session(family, dtype=torch.bfloat16), ids(45, 8)
    assert session.model.dtype == torch.bfloat16
    (logits,) = session.step([(session.add(tokens), 45)])
    exact = rounded(oracles[family], torch.bfloat16)
    wanted = expected(exact, tokens)
    theirs = expected(exact.to(torch.bfloat16), tokens)
    ours_rms, theirs_rms = (logits - wanted).square().mean().sqrt(), (theirs - wanted).square().mean().sqrt()
    assert ours_rms <= 1.25 * theirs_rms
    assert worst(logits, wanted) <= 2 * worst(theirs, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_invariant_rows_do_not_depend_on_batch_mates(open_session, family, dtype):
    """With invariant=True a decode gives the same bits alone, beside other decodes, and beside a long chunk."""
    outcomes = []
    for company in ([], [(23, 1)], [(23, 1)] * 6, [(0, 57)], [(12, 1), (0, 40)]):
        session, tokens = open_session(family, dtype=dtype, invariant=True), ids(30, 20)
        sequence = session.add(tokens)
        session.step([(sequence, 29)])
        mates = []
        for index, (before, count) in enumerate(company):
            mate = session.add(ids(before + count, 30 + index))
            if before:
                session.step([(mate, before)])
            mates.append((mate, count))
        outcomes.append(session.step([*mates, (sequence, 1)])[-1])
    assert all(torch.equal(outcome, outcomes[0]) for outcome in outcomes)


def test_layers_are_taken_over(open_session, checkpoint_dirs):
    """A second model from the same Parameters is refused: the first took the layers, to free what it repacked."""
    from benchmarks.random_model import random_parameters
    from model_core.dispatch.ops import Ops
    from model_core.model.llama import Llama

    config = open_session("llama2").model.config
    parameters = random_parameters(config, dtype=torch.float32, device="cpu")
    unpacked = parameters.nbytes
    model = Llama(config, parameters, Ops("cpu"), 16)
    assert not parameters.layers and model.nbytes >= unpacked
    with pytest.raises(AssertionError, match="another Llama"):
        Llama(config, parameters, Ops("cpu"), 16)
