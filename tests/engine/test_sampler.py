"""Sampling: Philox against its published vectors, distributions, cuts and penalties against references, rows that do not
touch each other."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from model_core.engine import sampler as sampler_module
from model_core.engine.philox import uniform
from model_core.engine.request import SamplingParams
from model_core.engine.sampler import Sampled, Sampler

pytestmark = pytest.mark.usefixtures("one_thread")

many = settings(deadline=None, max_examples=150)
GREEDY = SamplingParams(temperature=0.0)
# 1 - 1e-4 quantile of chi-square by degrees of freedom
CHI_SQUARE = {1: 15.14, 2: 18.42, 3: 21.11, 4: 23.51, 5: 25.74, 15: 44.26, 35: 75.10}


def noise(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def sample(logits: torch.Tensor, params: list[SamplingParams] | SamplingParams, *, prompts=None, outputs=None, positions=None,
           sampler: Sampler | None = None, slots=None, forbidden=()) -> Sampled:  # fmt: skip
    """One step of a new sampler; row r is slot r, at position r, unless said otherwise."""
    rows, vocab = logits.shape
    params = params if isinstance(params, list) else [params] * rows
    slots = list(range(rows)) if slots is None else slots
    sampler = sampler or Sampler(max(slots) + 1, vocab, torch.device("cpu"))
    for row, (slot, one) in enumerate(zip(slots, params, strict=True)):
        prompt, output = (prompts or {}).get(row, [0]), (outputs or {}).get(row, [])
        sampler.assign(slot, one, one.seed or 0, [*prompt, *output], len(prompt))
    positions = torch.arange(rows) if positions is None else torch.tensor(positions)
    return sampler.sample(logits.clone(), torch.tensor(slots), positions, params, list(forbidden))


# ---- random numbers ---------------------------------------------------------------------------------------------------


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    """Philox 4x32-10 as the paper writes it, in Python's integers."""
    (a, b, c, d), (k, l) = counter, key  # noqa: E741
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * a, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c, 1 << 32)
        a, b, c, d = high1 ^ b ^ k, low1, high0 ^ d ^ l, low0
        k, l = (k + 0x9E3779B9) % (1 << 32), (l + 0xBB67AE85) % (1 << 32)  # noqa: E741
    return [a, b, c, d]


def as_floats(words: list[int]) -> list[float]:
    return [((word >> 9) + 0.5) / (1 << 23) for word in words]


@pytest.mark.parametrize("counter, key, words", [
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0], "d16cfe09 94fdcceb 5001e420 24126ea1"),
], ids=["zeros", "ones", "pi"])  # fmt: skip
def test_the_reference_gives_the_vectors_of_random123(counter, key, words):
    assert " ".join(f"{word:08x}" for word in philox(tuple(counter), tuple(key))) == words


def test_uniform_gives_the_first_vector_of_random123():
    found = uniform(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 4)
    assert found[0].tolist() == as_floats([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8])


@many
@given(rows=st.lists(st.tuples(st.integers(-(1 << 63), (1 << 63) - 1), st.integers(0, (1 << 32) - 1)), min_size=1, max_size=4),
       count=st.integers(1, 11))  # fmt: skip
def test_uniform_is_philox_of_seed_and_position(rows, count):
    """Word j % 4 of counter (j // 4, 0, position, 0); every float is exact."""
    found = uniform(torch.tensor([seed for seed, _ in rows]), torch.tensor([position for _, position in rows]), count)
    for (seed, position), row in zip(rows, found.tolist(), strict=True):
        key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
        words = [word for block in range(-(-count // 4)) for word in philox((block, 0, position, 0), key)]
        assert row == as_floats(words)[:count]


@pytest.mark.parametrize("seed, element, value", [(33, 244107, 2.0**-24), (30, 203770, 1 - 2.0**-24)])
def test_the_extremes_are_neither_0_nor_1(seed, element, value):
    """Words that begin with 23 zeros and 23 ones, found by search: their Gumbel noise is finite."""
    found = uniform(torch.tensor([seed]), torch.tensor([0]), element + 1)[0, element]
    assert found.item() == value and (-found.log()).log().isfinite()


# ---- distributions ----------------------------------------------------------------------------------------------------


def probabilities(logits: list[float], p: SamplingParams) -> list[float]:
    """Temperature, top-k, top-p, min-p in float64, as SamplingParams promises them; ties with the last kept one stay."""
    scaled = [value / p.temperature for value in logits]
    if 0 < p.top_k < len(scaled):
        limit = sorted(scaled, reverse=True)[p.top_k - 1]
        scaled = [value if value >= limit else -math.inf for value in scaled]
    if p.top_p < 1:
        mass, limit = 0.0, math.inf
        for value, share in sorted(zip(scaled, softmax(scaled), strict=True), reverse=True):
            if mass < p.top_p or limit == math.inf:
                limit = value
            assume(abs(mass - p.top_p) > 1e-5)  # rounding decides
            mass += share
        scaled = [value if value >= limit else -math.inf for value in scaled]
    if p.min_p:
        shares = softmax(scaled)
        assume(all(abs(share / max(shares) - p.min_p) > 1e-5 * p.min_p for share in shares))
        scaled = [value if share >= p.min_p * max(shares) else -math.inf for value, share in zip(scaled, shares, strict=True)]
    return softmax(scaled)


def softmax(values: list[float]) -> list[float]:
    exps = [math.exp(value - max(values)) for value in values]
    return [value / sum(exps) for value in exps]


def chi_square(found: Counter, wanted: list[float], draws: int) -> None:
    assert not [token for token in found if not wanted[token]], "a token outside of the support"
    support = [token for token, share in enumerate(wanted) if share]
    distance = sum((found[token] - draws * wanted[token]) ** 2 / (draws * wanted[token]) for token in support)
    assert distance < CHI_SQUARE[len(support) - 1]


LOGITS = [1.0, 0.2, -1.3, 2.1, 1.9, -0.4]
DRAWS = 20_000


@pytest.mark.parametrize("params", [
    dict(), dict(temperature=0.6), dict(temperature=2.5), dict(top_k=3), dict(top_p=0.8), dict(min_p=0.15),
    dict(temperature=1.4, top_k=5, top_p=0.95, min_p=0.12),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("over", ["positions", "seeds"])
def test_draws_follow_the_softmax(params, over):
    """Over the positions of one sequence, and over sequences of different seeds at one position."""
    params = SamplingParams(**params)
    slots = torch.zeros(DRAWS, dtype=torch.int64) if over == "positions" else torch.arange(DRAWS)
    sampler = Sampler(int(slots.max()) + 1, len(LOGITS), torch.device("cpu"))
    sampler.assign(0, params, 1234, [0], 1)
    for table in (sampler.temperature, sampler.top_k, sampler.top_p, sampler.min_p):
        table.fill_(table[0].item())
    sampler.seed[1:] = 77 * torch.arange(1, len(sampler.seed))
    positions = torch.arange(DRAWS) if over == "positions" else torch.full((DRAWS,), 9)
    tokens = sampler.sample(torch.tensor([LOGITS]).repeat(DRAWS, 1), slots, positions, [params] * DRAWS, []).tokens
    chi_square(Counter(tokens.tolist()), probabilities(LOGITS, params), DRAWS)


def test_consecutive_draws_are_independent():
    """Pairs of tokens at positions n and n + 1 of one sequence."""
    shares = softmax(LOGITS)
    slots = torch.zeros(DRAWS + 1, dtype=torch.int64)
    sampler = Sampler(1, len(LOGITS), torch.device("cpu"))
    sampler.assign(0, SamplingParams(), 5, [0], 1)
    logits = torch.tensor([LOGITS]).repeat(DRAWS + 1, 1)
    tokens = sampler.sample(logits, slots, torch.arange(DRAWS + 1), [SamplingParams()] * (DRAWS + 1), []).tokens.tolist()
    pairs = Counter(6 * a + b for a, b in zip(tokens, tokens[1:], strict=False))
    chi_square(pairs, [a * b for a in shares for b in shares], DRAWS)


def test_seed_and_position_alone_make_the_noise():
    params, logits = SamplingParams(seed=3), torch.zeros(64, 50)
    first = sample(logits, params).tokens
    assert first.equal(sample(logits, params).tokens)
    assert not first.equal(sample(logits, SamplingParams(seed=4)).tokens)
    assert sample(logits, params, positions=list(range(63, -1, -1))).tokens.equal(first.flip(0))
    assert len(set(first.tolist())) > 20


def test_high_halves_of_seeds_count():
    """Seeds that share their lower 32 bits."""
    logits = torch.zeros(1, 1000)
    tokens = {sample(logits, SamplingParams(seed=5 + (high << 32))).tokens.item() for high in (-(1 << 31), -1, 0, 1, 1 << 30)}
    assert len(tokens) == 5


# ---- cuts -------------------------------------------------------------------------------------------------------------


def supports(logits: torch.Tensor, *params: SamplingParams) -> list[set[int]]:
    """For each of the params, all in one step, the tokens that can be drawn.

    One row per token gets the largest noise there is for it and the least for all others. They are 19 apart, so logits
    that are closer than that decide nothing.
    """
    size = len(logits)
    pushed = torch.full((size, size), 2.0**-24).fill_diagonal_(1 - 2.0**-24).repeat(len(params), 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler_module, "uniform", lambda seeds, positions, count: pushed.clone())
        drawn = sample(logits.repeat(len(params) * size, 1), [one for one in params for _ in range(size)]).tokens
    return [set(part[part == torch.arange(size)].tolist()) for part in drawn.split(size)]


cuts = st.builds(
    SamplingParams, temperature=st.floats(0.6, 2), top_k=st.integers(-1, 14),
    top_p=st.floats(0, 1) | st.just(1.0), min_p=st.just(0.0) | st.floats(0, 1),
)  # fmt: skip


@settings(many, max_examples=300)
@given(st.lists(st.integers(-20, 20).map(lambda n: n / 4), min_size=1, max_size=12), st.lists(cuts, min_size=1, max_size=4))
def test_the_support_is_that_of_plain_python(logits, params):
    """Logits on a grid: ties are common, at the edge of a cut too. Rows of one step with different cuts."""
    wanted = [{token for token, share in enumerate(probabilities(logits, one)) if share} for one in params]
    assert supports(torch.tensor(logits), *params) == wanted


@pytest.mark.parametrize("seed", range(40))
def test_the_support_is_that_of_transformers(seed):
    """Logits without ties; the vocabulary is large enough for both ways of finding the k best."""
    from transformers.generation import logits_process as theirs

    rng = random.Random(seed)
    params = SamplingParams(temperature=rng.uniform(0.5, 1.5), top_k=rng.choice([0, 1, 7, 200, 256, 257, 290, 400]),
                            top_p=rng.choice([1.0, 0.999, 0.9, 0.3]), min_p=rng.choice([0.0, 0.001, 0.1]))  # fmt: skip
    logits = noise(1, 300, seed).clamp(-4, 4) + torch.arange(300) * 1e-5
    wanted = theirs.TemperatureLogitsWarper(params.temperature)(None, logits)
    if params.top_k:
        wanted = theirs.TopKLogitsWarper(params.top_k)(None, wanted)
    if params.top_p < 1:
        wanted = theirs.TopPLogitsWarper(params.top_p)(None, wanted)
    if params.min_p:
        wanted = theirs.MinPLogitsWarper(params.min_p)(None, wanted)
    assert supports(logits[0], params) == [set(wanted[0].isfinite().nonzero()[:, 0].tolist())]


def test_top_k_1_and_top_p_0_are_greedy():
    logits = noise(40, 50)
    for params in (SamplingParams(top_k=1, temperature=3.0), SamplingParams(top_p=0.0, temperature=3.0),
                   SamplingParams(min_p=1.0, temperature=3.0)):  # fmt: skip
        assert sample(logits, params).tokens.equal(logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-38, 1e-40, 5e-324])
@pytest.mark.parametrize("cut", [dict(), dict(top_k=2), dict(top_p=0.9), dict(min_p=0.1)], ids=str)
def test_the_lower_the_temperature_the_greedier(temperature, cut):
    """Down to numbers by which float32 cannot divide. Logits are 1/4 apart."""
    logits = noise(40, 50).argsort(-1) / 4
    assert sample(logits, SamplingParams(temperature=temperature, **cut)).tokens.equal(logits.argmax(-1))


# ---- penalties, bias, forbidden tokens --------------------------------------------------------------------------------


def penalised(logits: list[float], p: SamplingParams, prompt: list[int], output: list[int]) -> list[float]:
    found = list(logits)
    for token in {*prompt, *output}:
        found[token] = found[token] / p.repetition_penalty if found[token] > 0 else found[token] * p.repetition_penalty
    for token, times in Counter(output).items():
        found[token] -= p.frequency_penalty * times + p.presence_penalty
    return found


penalties = st.builds(
    SamplingParams, temperature=st.just(0.0), repetition_penalty=st.floats(0.5, 3), presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
)  # fmt: skip
some_ids = st.lists(st.integers(0, 9), max_size=8)


@settings(many, max_examples=300)
@given(st.lists(st.floats(-3, 3, width=32), min_size=10, max_size=10), st.sampled_from([0, 4]), penalties, some_ids, some_ids)
def test_penalties_are_those_of_plain_python(logits, down, params, prompt, output):
    """Of both signs, and all negative."""
    logits = [value - down for value in logits]
    wanted = penalised(logits, params, [0, *prompt], output)
    best, second = sorted(wanted)[:-3:-1]
    assume(best - second > 1e-5)
    found = sample(torch.tensor([logits]), [params], prompts={0: [0, *prompt]}, outputs={0: output}).tokens.item()
    assert found == wanted.index(best)


def test_repetition_penalty_is_that_of_transformers():
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    logits, changed = noise(300, 20, 1) / 3, 0
    logits[::2] -= 5.0  # a repetition penalty makes negative ones more so
    prompts = {row: random.Random(row).choices(range(20), k=1 + row % 30) for row in range(300)}
    for penalty in (0.7, 1.3, 2.0):
        found = sample(logits, SamplingParams(temperature=0.0, repetition_penalty=penalty), prompts=prompts).tokens
        for row in range(300):
            wanted = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompts[row]]), logits[row : row + 1].clone())
            assert found[row] == wanted.argmax()
        changed += (found != logits.argmax(-1)).sum().item()
    assert changed > 100


def test_counts_follow_the_tokens_step_after_step():
    """Two sequences with penalties and one without, which shares their steps; the first resumes in another slot."""
    prompts = [[1, 1, 2], [3], [4]]
    params = [SamplingParams(temperature=0.0, frequency_penalty=1.5, presence_penalty=0.5),
              SamplingParams(temperature=0.0, repetition_penalty=1.8), GREEDY]  # fmt: skip
    sampler, outputs, slots = Sampler(4, 12, torch.device("cpu")), [[], [], []], [0, 1, 2]
    for slot in range(3):
        sampler.assign(slot, params[slot], 0, prompts[slot], len(prompts[slot]))
    for step in range(40):
        if step == 20:
            slots[0] = 3
            sampler.assign(3, params[0], 0, prompts[0] + outputs[0], len(prompts[0]))
        logits = noise(3, 12, step)
        tokens = sampler.sample(logits.clone(), torch.tensor(slots), torch.tensor([step] * 3), params, []).tokens.tolist()
        for row in range(3):
            wanted = penalised(logits[row].tolist(), params[row], prompts[row], outputs[row])
            assert tokens[row] == wanted.index(max(wanted))
            outputs[row].append(tokens[row])
    assert outputs[0] != outputs[2] != outputs[1]


def test_logit_bias_is_added_to_its_tokens_only():
    logits = noise(3, 1000)
    order = logits[0].argsort(descending=True).tolist()
    gap = (logits[0, order[0]] - logits[0, order[1]]).item()
    for bias, wanted in (({order[1]: gap + 0.01}, order[1]), ({order[1]: gap - 0.01}, order[0]), ({order[0]: -100}, order[1]),
                         (dict.fromkeys(order[:512], -100.0), order[512])):  # fmt: skip
        params = [SamplingParams(temperature=0.0, logit_bias=one) for one in (bias, {}, {7: 100})]
        assert sample(logits, params).tokens.tolist() == [wanted, logits[1].argmax(), 7]


def test_bias_comes_before_penalties_and_both_before_the_cuts():
    """2 + 2 halved is less than 3; added after the penalty it would be 3 + 1."""
    params = SamplingParams(temperature=1.0, top_k=1, logit_bias={0: 2.0}, repetition_penalty=2.0)
    assert sample(torch.tensor([[2.0, 2.5, 0.0]]), [params], prompts={0: [0]}).tokens.item() == 1


def test_forbidden_tokens_are_not_chosen():
    logits = noise(200, 6)
    hot = SamplingParams(temperature=50.0, logit_bias={1: 100.0})
    drawn = sample(logits, hot, forbidden=[(row, (1, 4)) for row in range(0, 200, 2)]).tokens
    assert set(drawn[0::2].tolist()) == {0, 2, 3, 5} and {1, 4} <= set(drawn[1::2].tolist())
    best = sample(logits, [GREEDY] * 200, forbidden=[(0, (int(logits[0].argmax()),))]).tokens
    assert best[0] == logits[0].argsort(descending=True)[1] and best[1:].equal(logits[1:].argmax(-1))


def test_greedy_ties_go_to_the_lowest_id():
    for vocab, ties in ((5, [1, 3]), (300, [17, 18, 299]), (32000, [9, 16000, 31999]), (32003, [31, 32, 8191])):
        logits = noise(4, vocab).clamp(max=5)
        logits[1, ties] = 6.0
        assert sample(logits, GREEDY).tokens[1] == ties[0]
        assert sample(torch.zeros(2, vocab), GREEDY).tokens.tolist() == [0, 0]


# ---- log-probabilities ------------------------------------------------------------------------------------------------


def test_logprobs_are_raw_whatever_else_is_asked():
    """log_softmax of the model's own logits; each row gets as many as it asks for."""
    logits = noise(4, 300)
    params = [SamplingParams(temperature=0.5, top_k=3, logit_bias={5: 30.0}, repetition_penalty=1.5, logprobs=4, seed=1),
              SamplingParams(logprobs=0, seed=2), GREEDY, SamplingParams(temperature=0.0, logprobs=100)]  # fmt: skip
    found, wanted = sample(logits, params), torch.log_softmax(logits.double(), -1)
    assert found.tokens[0] == 5 and found.tokens[3] == logits[3].argmax()
    for row, count in ((0, 4), (1, 0), (3, 100)):
        one, best = found.logprobs_of(row, count), wanted[row].sort(descending=True)
        assert one.logprob == pytest.approx(wanted[row, found.tokens[row]].item(), abs=1e-5)
        assert [token for token, _ in one.top] == best.indices[:count].tolist()
        assert [value for _, value in one.top] == pytest.approx(best.values[:count].tolist(), abs=1e-5)


def test_no_logprobs_are_computed_where_no_row_asks():
    found = sample(noise(2, 30), GREEDY)
    assert found.logprob is found.top_ids is found.top_logprobs is None


# ---- rows and slots ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_logits_that_are_no_numbers_give_minus_1_and_harm_no_other_row(bad):
    logits = noise(5, 40)
    params = [SamplingParams(top_p=0.9, top_k=5, frequency_penalty=1.0, logprobs=2, seed=row) for row in range(5)]
    wanted = sample(logits, params).tokens.tolist()
    logits[2, 7] = bad
    assert sample(logits, params).tokens.tolist() == [*wanted[:2], -1, *wanted[3:]]
    assert sample(logits, GREEDY).tokens.tolist()[2] == -1


anything = st.builds(
    SamplingParams, temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]), top_k=st.sampled_from([0, 1, 5, 256, 280, 999]),
    top_p=st.sampled_from([1.0, 0.95, 0.5]), min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.4]), presence_penalty=st.sampled_from([0.0, 0.0, 1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, -0.5]), logprobs=st.sampled_from([None, None, 0, 3, 20]),
    logit_bias=st.sampled_from([{}, {}, {3: 2.0, 8: -100.0}]), seed=st.integers(0, 1 << 40),
)  # fmt: skip


@settings(many, max_examples=100)
@given(params=st.lists(anything, min_size=2, max_size=6), data=st.data())
def test_a_row_does_not_depend_on_the_others(params, data):
    """Bit for bit: token and log-probabilities of each row alone, in slot 0, and in any company, order and slot."""
    rows = len(params)
    logits = noise(rows, 300, data.draw(st.integers(0, 1000)))
    forbidden = [(row, (int(logits[row].argmax()),)) for row in range(rows) if data.draw(st.booleans())]
    prompts = {row: [row, 5, 9] for row in range(rows)}
    slots = data.draw(st.permutations(range(rows + 2)))[:rows]
    together = sample(logits, params, prompts=prompts, slots=slots, forbidden=forbidden)
    for row, one in enumerate(params):
        alone = sample(logits[row : row + 1], [one], prompts={0: prompts[row]}, positions=[row],
                       forbidden=[(0, banned) for at, banned in forbidden if at == row])  # fmt: skip
        assert together.tokens[row] == alone.tokens[0]
        if one.logprobs is not None:
            assert together.logprobs_of(row, one.logprobs) == alone.logprobs_of(0, one.logprobs)


@settings(many, max_examples=100)
@given(first=anything, second=anything, mate=anything)
def test_a_reused_slot_remembers_nothing(first, second, mate):
    """Slot 0 serves one sequence, beside a mate that makes every part of the step run, and then another."""
    used = Sampler(2, 300, torch.device("cpu"))
    for step in range(3):
        sample(noise(2, 300, step), [first, mate], sampler=used, prompts={0: [1, 2, 3]})
    logits = noise(1, 300, 9)
    again = sample(logits, [second], sampler=used, prompts={0: [4]}, positions=[7])
    fresh = sample(logits, [second], prompts={0: [4]}, positions=[7])
    assert again.tokens.equal(fresh.tokens)


def test_a_reused_slot_forgets_bias_and_counts():
    """The same with values that would decide."""
    used = Sampler(1, 50, torch.device("cpu"))
    for params, token in ((dict(logit_bias={7: 50.0, 8: 40.0}, frequency_penalty=2.0), 7), (dict(logit_bias={3: 1.0}), 3),
                          (dict(frequency_penalty=-2.0, presence_penalty=-2.0), 0)):  # fmt: skip
        params = [SamplingParams(temperature=0.0, **params)]
        assert sample(torch.zeros(1, 50), params, sampler=used, prompts={0: [20]}).tokens.item() == token
