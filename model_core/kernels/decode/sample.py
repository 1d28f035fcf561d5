"""The end of a decode step, second half: choose each row's token and advance its slot.

Greedy rows take the largest logit, the lowest id among equals. Rows with a temperature take the argmax of
logits / temperature + Gumbel noise, which samples the softmax; the noise is Philox 4x32-10 of (seed, position), the same
numbers as engine/philox.py. SPLITS programs share a row; the last one to arrive picks among their candidates in order.
Rows that restrict.py cut come divided, with the threshold below which nothing is chosen.

Rows of slots with HELD are passed over, unless the launch is theirs (state.HeldRows): of theirs, a mask may leave nothing.
"""

from __future__ import annotations

import torch

from model_core.engine.philox import uniform
from model_core.kernels.decode.products import follow, launch_options
from model_core.kernels.decode.state import HELD, PENALTIES, RING, RULES, DecodeState, HeldRows
from model_core.kernels.runtime import cdiv, jit, tl

_SPLITS = 16
COLUMNS, CANDIDATES = 2048, 4096  # of restrict.py: maxima of a row that is cut, and what it may keep outside the row
SAMPLE_BYTES = 4 * (COLUMNS + CANDIDATES + 2 * _SPLITS + 3)  # of a row of SampleSpace
HOPELESS = -1e25  # below any logit, and above what is forbidden (restrict.py), whatever temperature divides them
_RULES, _RING, _PENALTIES, _HELD, _HOPELESS = map(tl.constexpr, (RULES, RING, PENALTIES, HELD, HOPELESS))


@jit(do_not_specialize_on_alignment=["rows_ptr", "places_ptr"])  # a prefill graph's lies between other arrays
def _kernel(
    logits_ptr, best_ptr, where_ptr, arrived_ptr, rows_ptr, token_ptr, position_ptr, temperature_ptr, seed_ptr, chosen_ptr,
    limit_ptr, rules_ptr, counts_ptr, places_ptr, dump, V: tl.constexpr, SPLITS: tl.constexpr, SHARE: tl.constexpr,
    BLOCK: tl.constexpr, OF_HELD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    split, row = tl.program_id(0), tl.program_id(1)
    slot = tl.load(rows_ptr + row)  # what the host or the step before wrote is there before the wait
    flags = tl.load(rules_ptr + slot * _RULES)
    position = tl.load(position_ptr + slot)
    temperature = tl.load(temperature_ptr + slot)
    seed = tl.load(seed_ptr + slot)
    follow(PDL)
    if ((flags & _HELD) != 0) != OF_HELD:
        return
    row_ptr = logits_ptr + (tl.load(places_ptr + row) if OF_HELD else row.to(tl.int64)) * V
    limit = tl.load(limit_ptr + row)
    scale = 1.0 / tl.where((temperature > 0) & (limit == float("-inf")), temperature, 1.0)
    best = tl.full([BLOCK, 4], float("-inf"), tl.float32)
    where = tl.full([BLOCK, 4], V, tl.int32)
    broken = tl.zeros([BLOCK, 4], tl.int32)
    for start in tl.static_range(0, SHARE, BLOCK):
        quad = start + tl.arange(0, BLOCK)
        c = (split * SHARE + quad).to(tl.uint32)  # Philox counter: four logits each
        j = c.to(tl.int32)[:, None] * 4 + tl.arange(0, 4)[None, :]
        inside = (quad < SHARE)[:, None] & (j < V)
        x = tl.load(row_ptr + j, mask=inside, other=float("-inf"))
        broken |= (inside & ((x != x) | (x == float("inf")) | (x == float("-inf")))).to(tl.int32)
        x = tl.where(x < limit, float("-inf"), x)
        if temperature > 0:  # the same for all of a program's logits: greedy rows skip the arithmetic
            zero = c * 0
            w0, w1, w2, w3 = tl.philox(seed, c, zero, zero + (position + 1).to(tl.uint32), zero)
            words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK, 4)
            u = ((words >> 9).to(tl.float32) + 0.5) * (1.0 / (1 << 23))
            x = x * scale - tl.log(-tl.log(u))
        better = (x > best) | ((x == best) & (j < where))
        best = tl.where(better, x, best)
        where = tl.where(better, j, where)
    top = tl.max(tl.max(best, axis=1), axis=0)
    index = tl.min(tl.min(tl.where(best == top, where, V), axis=1), axis=0)
    top = tl.where(tl.max(tl.max(broken, axis=1), axis=0) > 0, float("nan"), top)
    tl.store(best_ptr + row * SPLITS + split, top)
    tl.store(where_ptr + row * SPLITS + split, index)
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel") == SPLITS - 1:
        s = tl.arange(0, SPLITS)
        tops = tl.load(best_ptr + row * SPLITS + s, cache_modifier=".cg")
        indices = tl.load(where_ptr + row * SPLITS + s, cache_modifier=".cg")
        bad = tl.max((tops != tops).to(tl.int32), axis=0) > 0
        top = tl.max(tops, axis=0)
        token = tl.min(tl.where(tops == top, indices, V), axis=0).to(tl.int64)
        token = tl.where(bad, 0, token)
        if slot != dump:  # where padding rows meet, nothing moves
            tl.store(token_ptr + slot, token)
            tl.store(position_ptr + slot, position + 1)
            more = 2
            if OF_HELD:  # what is stuck may only have to wait for its mask
                more = tl.where(top < _HOPELESS, 0, 2)
            if (flags & _PENALTIES) != 0:
                count_ptr = counts_ptr + slot * V + token
                tl.store(count_ptr, tl.load(count_ptr) + more)
            if OF_HELD:
                token = tl.where(top < _HOPELESS, -2, token)
            tl.store(chosen_ptr + slot * _RING + (position + 1) % _RING, tl.where(bad, -1, token))
        tl.store(arrived_ptr + row, 0)


class SampleSpace:
    """Workspace for `rows` rows; `arrived` is zero between launches. `limit`: -inf for rows that are not cut."""

    def __init__(self, rows: int, device: torch.device | str) -> None:
        self.best = torch.empty((rows, _SPLITS), dtype=torch.float32, device=device)
        self.where = torch.empty((rows, _SPLITS), dtype=torch.int32, device=device)
        self.arrived = torch.zeros(rows, dtype=torch.int32, device=device)
        self.limit = torch.full((rows,), -torch.inf, dtype=torch.float32, device=device)
        self.uncut = self.limit.clone()  # stays so
        self.columns = torch.empty((rows, COLUMNS), dtype=torch.float32, device=device)
        self.candidates = torch.empty((rows, CANDIDATES), dtype=torch.float32, device=device)


def sample(
    logits: torch.Tensor, rows: torch.Tensor, state: DecodeState, space: SampleSpace, *, pdl: bool,
    held: HeldRows | None = None, ruled: bool = True,
) -> None:
    """Choose the tokens of slots `rows` int64 [M] by logits float32 [M, vocab]: state.chosen, last_token and position advance,
    but not the dump slot's. space.limit [M] is restrict's, or not looked at where none of them is `ruled`. Nothing is done for
    slots with HELD.

    held: these rows' slots have HELD, and theirs are other rows of the logits."""
    count, vocab = len(rows), logits.shape[1]
    share = cdiv(cdiv(vocab, 4), _SPLITS)
    _kernel[(_SPLITS, count)](
        logits, space.best, space.where, space.arrived, rows, state.last_token, state.position, state.temperature,
        state.seed, state.chosen, space.limit if ruled else space.uncut, state.rules, state.counts,
        rows if held is None else held.places, state.dump, V=vocab, SPLITS=_SPLITS, SHARE=share, BLOCK=256,
        OF_HELD=held is not None, PDL=pdl, num_warps=4, **launch_options(pdl))  # fmt: skip


def sample_torch(logits: torch.Tensor, rows: torch.Tensor, state: DecodeState, space: SampleSpace,
                 held: HeldRows | None = None) -> None:  # fmt: skip
    """Reference."""
    if held is not None:
        logits = logits[held.places]
    finite = torch.isfinite(logits).all(-1)
    temperature, limit = state.temperature[rows, None], space.limit[: len(rows), None]
    logits = logits.masked_fill(logits < limit, -torch.inf)
    u = uniform(state.seed[rows], state.position[rows].long() + 1, logits.shape[1])
    drawn = logits / torch.where((temperature > 0) & (limit == -torch.inf), temperature, 1.0) - (-u.log()).log()
    chosen = torch.where(temperature > 0, drawn, logits)
    done = ((state.rules[rows, 0] & HELD) > 0) == (held is not None)
    tokens = chosen.argmax(-1)
    told = torch.where(finite, tokens if held is None else tokens.where(chosen.amax(-1) >= HOPELESS, -2), -1)
    done &= rows != state.dump
    told, rows = told[done], rows[done]
    state.last_token[rows] = told.clamp(min=0)
    state.position[rows] += 1
    state.chosen[rows.cpu(), (state.position[rows] % RING).cpu()] = told.cpu()
    counted = rows[((state.rules[rows, 0] & PENALTIES) > 0) & (told != -2)]
    state.counts[counted, state.last_token[counted]] += 2


def bytes_moved(rows: int, vocab: int) -> int:
    """The logits once."""
    return 4 * rows * vocab


def flops(rows: int, vocab: int, *, noise: bool) -> int:
    """A comparison per logit; about 60 integer operations and two logarithms for the noise of one."""
    return rows * vocab * (62 if noise else 1)
