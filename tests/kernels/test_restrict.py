"""What a request asks of its logits, done by kernels in a graph: the same as the sampler's op by op."""

import itertools
from dataclasses import replace

import pytest
import torch

from model_core.engine.request import SamplingParams
from model_core.engine.rules import rules_of
from model_core.engine.sampler import Sampler, divisor
from model_core.kernels.decode.products import chains_launches
from model_core.kernels.decode.restrict import restrict, restrict_torch
from model_core.kernels.decode.sample import CANDIDATES, COLUMNS, SampleSpace, sample, sample_torch
from model_core.kernels.decode.state import HELD, PENALTIES, DecodeState, HeldRows
from tests.kernels.chosen import chosen

GPU = torch.cuda.is_available()
VOCAB = 700
STOPS = frozenset((3, 90))
PROMPT, OUTPUT = [1, 5, 5, 90, 17], [5, 3, 8, 3]
HERE = len(PROMPT) + len(OUTPUT)  # position of the token that is chosen

CUTS = [dict(zip(("top_k", "top_p", "min_p"), cut, strict=True))
        for cut in itertools.product((0, 1, 40), (1.0, 0.61), (0.0, 0.083))]  # fmt: skip
EDITS = [dict(logit_bias={7: 4.0, 90: -50.0, 699: 11.0}), dict(repetition_penalty=1.7), dict(min_tokens=5), dict(min_tokens=4),
         dict(presence_penalty=1.3, frequency_penalty=-0.6),
         dict(min_tokens=20, logit_bias={3: 100.0}, repetition_penalty=0.4, frequency_penalty=1.1)]  # fmt: skip


class Case:
    """Slot i asks for asks[i], has its tokens behind it, and is row i."""

    def __init__(self, asks, logits, device):
        vocab = logits.shape[1]
        self.asks, self.logits = asks, logits.to(device)
        self.sampler = Sampler(len(asks), vocab, torch.device(device))
        self.state = DecodeState.empty(len(asks), 1, device, self.sampler.counts)
        self.state.position[:-1] = HERE - 1
        for slot, ask in enumerate(asks):
            self.sampler.assign(slot, ask, slot, PROMPT + OUTPUT, len(PROMPT))
            self.state.temperature[slot], self.state.seed[slot] = divisor(ask.temperature), slot
            rules = rules_of(ask, STOPS, len(PROMPT), vocab)
            if rules is not None:
                self.state.rules[slot] = torch.from_numpy(rules).to(device)
        self.rows = torch.arange(len(asks), device=device)
        self.space, self.pdl = SampleSpace(len(asks), device), chains_launches(torch.device(device))

    def restrict(self):
        self.space.limit.fill_(torch.nan)
        logits = self.logits.clone()
        restrict(logits, self.rows, self.state, self.space, pdl=self.pdl)
        return logits, self.space.limit[:, None].clone()

    def check(self):
        """Logits and what is kept of them are the reference's, tokens and counts the sampler's. Returns logits and limits."""
        expected, space = self.logits.clone(), SampleSpace(len(self.rows), self.logits.device)
        restrict_torch(expected, self.rows, self.state, space)
        wanted = space.limit[:, None]
        logits, limit = self.restrict()
        torch.testing.assert_close(logits, expected, rtol=1e-6 if GPU else 0, atol=0)
        wrong = ((logits >= limit) != (expected >= wanted)).any(-1).nonzero()[:, 0].tolist()
        assert not wrong, [(self.asks[row], limit[row], wanted[row]) for row in wrong]
        assert (limit == -torch.inf).equal(wanted == -torch.inf)

        before = self.sampler.counts.clone()
        sample(logits, self.rows, self.state, self.space, pdl=self.pdl)
        out = chosen(self.state, self.rows)
        after = self.sampler.counts.clone()
        self.sampler.counts.copy_(before)
        early = [(row, tuple(STOPS)) for row, ask in enumerate(self.asks) if len(OUTPUT) < ask.min_tokens]
        tokens = self.sampler.sample(self.logits.clone(), self.rows, torch.full_like(self.rows, HERE), self.asks, early).tokens
        assert out.equal(tokens), [self.asks[row] for row in (out != tokens).nonzero()[:, 0]]
        counted = (self.state.rules[:-1, 0] & PENALTIES) > 0
        assert after[counted].equal(self.sampler.counts[counted]) and after[~counted].equal(before[~counted])
        return logits, limit


class Held:
    """These slots of a case get HELD, and launches of their own. allowed: bool [M, vocab]."""

    def __init__(self, case, slots, allowed):
        self.case, self.allowed = case, allowed.to(case.rows.device)
        case.state.rules[slots, 0] |= HELD
        self.slots = torch.tensor(slots, device=case.rows.device)
        bits = torch.nn.functional.pad(self.allowed, (0, -allowed.shape[1] % 32)).view(len(slots), -1, 32).long()
        words = (bits << torch.arange(32, device=bits.device)).sum(-1)
        self.rows = HeldRows(self.slots, torch.where(words >= 1 << 31, words - (1 << 32), words).int())

    def choose(self, logits):
        """Tokens of the held rows by the kernels, and by the sampler from logits that nobody has touched. For the kernels they
        lie one place further."""
        case = self.case
        before, counts = case.logits[self.slots].clone(), case.sampler.counts.clone()
        shifted, rows = logits.roll(1, 0), replace(self.rows, places=(self.slots + 1) % len(logits))
        restrict(shifted, self.slots, case.state, case.space, pdl=False, held=rows)
        sample(shifted, self.slots, case.state, case.space, pdl=False, held=rows)
        logits.copy_(shifted.roll(-1, 0))
        after = case.sampler.counts.clone()
        case.sampler.counts.copy_(counts)
        asks = [case.asks[row] for row in self.slots.tolist()]
        early = [(row, tuple(STOPS)) for row, ask in enumerate(asks) if len(OUTPUT) < ask.min_tokens]
        tokens = case.sampler.sample(before, self.slots, torch.full_like(self.slots, HERE), asks, early, self.rows.masks).tokens
        counted = (case.state.rules[self.slots, 0] & PENALTIES) > 0
        counted &= tokens != -1
        assert after[self.slots[counted]].equal(case.sampler.counts[self.slots[counted]])
        assert case.state.last_token[self.slots].equal(tokens.clamp(min=0))
        assert (case.state.position[self.slots] == HERE).all()
        return chosen(case.state, self.slots), tokens


def noise(rows, vocab, step=0.25, seed=0):
    """Multiples of `step`: many are equal."""
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3 / step).round() * step


def asking(*changes, **common):
    return [SamplingParams(**{"max_tokens": 30, **common, **change}) for change in changes]


def test_every_cut_is_the_samplers(device):
    heats = ({"temperature": temperature} for temperature in itertools.cycle((0.6, 1.0, 1.7)))
    Case(asking(*[cut | heat for cut, heat in zip(CUTS, heats, strict=False)]), noise(len(CUTS), VOCAB), device).check()


def test_every_edit_is_the_samplers_alone_greedily_and_before_a_cut(device):
    cuts = dict(temperature=0.7, top_k=20, top_p=0.83)
    asks = asking(*EDITS) + asking(*EDITS, temperature=0.0, top_k=2, top_p=0.1, min_p=0.9) + asking(*EDITS, **cuts)
    Case(asks, noise(len(asks), VOCAB, seed=1), device).check()


@pytest.mark.parametrize("vocab", [1, 2, 300, COLUMNS - 1, COLUMNS + 1, 4 * COLUMNS + 3, *[32000, 151936] * GPU])
def test_rows_of_every_length(device, vocab):
    cut = dict(top_k=50) if vocab > 50 else dict(min_p=0.4)
    Case(asking(dict(top_p=0.9) | cut, temperature=0.9), noise(1, vocab, 2**-10), device).check()


def test_what_is_too_much_to_gather_is_bisected_in_the_row(device):
    """A crowd of equals, a flat distribution, k beyond the columns."""
    vocab = COLUMNS + CANDIDATES
    equal = torch.zeros(vocab)
    equal[[5, 9]] = 1.0
    logits = torch.stack((equal, noise(1, vocab, 2**-10)[0] / 100, noise(1, vocab)[0], noise(1, vocab)[0]))
    _, limits = Case(asking(dict(top_k=3), dict(top_p=0.99), dict(top_k=COLUMNS + 7), dict(top_k=vocab - 1, top_p=0.9)),
                     logits, device).check()  # fmt: skip
    assert limits[0] == 0


def test_plain_rows_are_left_alone(device):
    case = Case(asking(dict(temperature=0.0, top_k=3), dict(), dict(min_tokens=4, temperature=0.0)), noise(3, VOCAB), device)
    logits, limits = case.check()
    assert logits.equal(case.logits) and (limits == -torch.inf).all()


def test_zeros_of_both_signs_are_equals(device):
    logits = torch.full((2, VOCAB), -5.0)
    logits[:, 7], logits[:, 9], logits[0, 3], logits[1, 3] = 0.0, -0.0, -0.0, 1.0
    restricted, limits = Case(asking(dict(top_k=1), dict(top_k=2)), logits, device).check()
    assert (restricted >= limits).sum(-1).tolist() == [3, 3]


def test_extreme_temperatures_and_stop_ids_do_not_break_a_row(device):
    changes = [dict(temperature=heat, **cut) for heat in (1e-9, 100.0) for cut in (dict(top_k=9), dict(top_p=0.9))]
    Case(asking(*changes, min_tokens=20), noise(4, VOCAB, 2**-10) * 5, device).check()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_row_is_told_and_its_mates_do_not_notice(device, value):
    """Also where the broken logit is one of a forbidden token."""
    ask = dict(top_k=9, top_p=0.9, min_p=0.01, frequency_penalty=0.5, logit_bias={3: 1.0}, min_tokens=20)
    logits = noise(3, VOCAB, 2**-10)
    whole, _ = Case(asking(*[ask] * 3), logits, device).check()
    logits[0, 3] = logits[2, 500] = value
    case = Case(asking(*[ask] * 3), logits, device)
    found, _ = case.restrict()
    sample(found, case.rows, case.state, case.space, pdl=case.pdl)
    out = chosen(case.state, case.rows)
    assert out.tolist()[::2] == [-1, -1] and out[1] >= 0 and found[1].equal(whole[1])


def test_the_references_give_the_same_tokens(device):
    asks = asking(dict(top_k=9), dict(top_p=0.8), dict(temperature=0.0, presence_penalty=2.0))
    case = Case(asks, noise(3, VOCAB, 2**-10), device)
    _, limits = case.check()
    tokens = case.state.last_token.clone()
    case.state.position[:-1] -= 1
    logits = case.logits.clone()
    case.sampler.counts[2, tokens[2]] -= 2
    restrict_torch(logits, case.rows, case.state, case.space)
    sample_torch(logits, case.rows, case.state, case.space)
    assert chosen(case.state, case.rows).equal(tokens[:-1])


def test_held_rows_wait_for_their_masks(device):
    """The first launch leaves them and theirs alone; the second one gives the sampler's tokens, whatever the mask leaves."""
    edits = dict(min_tokens=20, logit_bias={3: 100.0, 7: 4.0}, repetition_penalty=0.4, frequency_penalty=1.1)
    asks = asking(dict(temperature=0.0), dict(), dict(top_k=40), edits, dict(top_p=0.61), edits | dict(top_k=40, top_p=0.8),
                  dict(min_p=0.083, temperature=1.7), edits | dict(temperature=0.0), dict(top_k=3), dict(top_k=40, top_p=0.9))
    order = [7, 2, 0, 9, 5, 4, 3, 6, 8]  # row 1 is not held
    case = Case(asks, noise(len(asks), VOCAB, seed=2), device)
    chance = torch.Generator().manual_seed(3)
    shares = torch.tensor([0.5, 0.02, 0.3, 0.01, 0.2, 0.9, 0.1, 0.5, 1.0])[:, None]
    allowed = torch.rand(len(order), VOCAB, generator=chance) < shares
    allowed[3, [11, 11 + 32, 699]] = True  # few for a k of 40
    held = Held(case, order, allowed)

    logits, counts = case.logits.clone(), case.sampler.counts.clone()
    case.state.chosen.fill_(55)
    restrict(logits, case.rows, case.state, case.space, pdl=case.pdl)
    sample(logits, case.rows, case.state, case.space, pdl=case.pdl)
    out = chosen(case.state, case.rows)
    assert logits.equal(case.logits) and case.sampler.counts.equal(counts) and out[0] == out[9] == 55 != out[1]
    assert case.state.position[:-1].tolist() == [HERE - 1, HERE] + [HERE - 1] * 8
    assert not case.state.last_token[[0, 2, 9]].any() and case.state.last_token[1] == out[1]

    expected, space = logits.clone(), SampleSpace(len(asks), device)
    restrict_torch(expected, held.slots, case.state, space, held.rows)
    changed = ("chosen", "last_token", "position", "counts")
    state = replace(case.state, **{name: getattr(case.state, name).clone() for name in changed})
    sample_torch(expected, held.slots, state, space, held.rows)
    found, tokens = held.choose(logits)
    torch.testing.assert_close(logits, expected, rtol=1e-6 if GPU else 0, atol=0)
    assert found.equal(tokens) and chosen(state, held.slots).equal(tokens) and held.allowed.gather(1, tokens[:, None]).all()


@pytest.mark.parametrize("params", [dict(temperature=0.0), dict(), dict(top_k=5, top_p=0.9, min_p=0.1, temperature=100.0),
                                    dict(frequency_penalty=1.0)], ids=str)  # fmt: skip
def test_masks_that_leave_nothing_and_broken_rows_are_told_apart(device, params):
    """Nothing at all; nothing but ends that are too early; all, of logits that are no numbers; nothing of these; one token."""
    case = Case(asking(*[params | dict(min_tokens=20)] * 5), noise(5, VOCAB, 2**-10), device)
    allowed = torch.zeros(5, VOCAB, dtype=torch.bool)
    allowed[1, list(STOPS)], allowed[2], allowed[4, [17, *STOPS]] = True, True, True
    case.logits[2, 5], case.logits[3, 9] = torch.nan, torch.inf
    before = case.sampler.counts.clone()
    found, tokens = Held(case, list(range(5)), allowed).choose(case.logits.clone())
    assert found.tolist() == tokens.tolist() == [-2, -2, -1, -1, 17]
    assert case.sampler.counts[:2].equal(before[:2]), "one that sits a step out has no token"


@pytest.mark.skipif(not GPU, reason="the interpreter has no races")
def test_the_same_bits_every_time(device):
    changes = [dict(top_k=50, top_p=0.9), dict(top_p=0.9), dict(top_p=0.99, temperature=2.0), dict(min_p=0.1)]
    case = Case(asking(*changes * 32), noise(128, 32000, 2**-10), device)
    logits, limits = case.restrict()
    for _ in range(20):
        again, limits_again = case.restrict()
        assert again.equal(logits) and limits_again.equal(limits)
