"""The end of a decode step, between head and sample: what requests ask of their logits beyond a temperature and a seed.

A row whose slot asks for nothing (DecodeState.rules) is left alone. The others are rewritten in place in the order of
engine/sampler.py: bias, penalties, stop ids that are too early, what a mask does not allow; where tokens are cut, division by
the temperature. A cut (top-k, top-p, min-p) leaves its threshold in `limit`, and sample.py passes over what is below. Rows of
slots with HELD are left alone, unless the launch is theirs (state.HeldRows).

No row is sorted. A threshold is found by bisection, over floats ordered like integers of their bits (`_key`): the largest t
with count(x >= t) >= k, or with mass(x >= t) >= p * mass. Masses are sums of exp(x - max) in fixed point, 2**-40 a unit: sums
of integers are exact in any order and never rise with t, so there is one threshold. What bisection looks at is made small
first: a row is folded to _COLUMNS maxima, and where k of the maxima (or p of the mass) are at or above some value, so are k
of the row. Only what reaches that value is gathered, and bisected. Where that is too much (a flat distribution, a k of
thousands, a crowd of equals), each of the at most 32 passes reads the whole row from L2.
"""

from __future__ import annotations

import torch

from model_core.kernels.decode import state as at
from model_core.kernels.decode.products import follow, launch_options
from model_core.kernels.decode.sample import CANDIDATES, COLUMNS, HOPELESS, SampleSpace
from model_core.kernels.decode.state import DecodeState, HeldRows
from model_core.kernels.runtime import cdiv, jit, next_power_of_2, tl

_RULES, _MAX_STOPS, _MAX_LOGIT_BIAS = (tl.constexpr(size) for size in (at.RULES, at.MAX_STOPS, at.MAX_LOGIT_BIAS))
_BIAS, _PENALTIES, _STOPS, _HELD = (tl.constexpr(bit) for bit in (at.BIAS, at.PENALTIES, at.STOPS, at.HELD))
_TOP_K, _TOP_P, _MIN_P = (tl.constexpr(bit) for bit in (at.TOP_K, at.TOP_P, at.MIN_P))
_BIAS_COUNT, _BIAS_IDS, _BIAS_VALUES = (tl.constexpr(word) for word in (at.BIAS_COUNT, at.BIAS_IDS, at.BIAS_VALUES))
_STOP_COUNT, _STOP_IDS, _FIRST_STOP = (tl.constexpr(word) for word in (at.STOP_COUNT, at.STOP_IDS, at.FIRST_STOP))
_REPETITION, _PRESENCE, _FREQUENCY = (tl.constexpr(word) for word in (at.REPETITION, at.PRESENCE, at.FREQUENCY))
_WANTED_K, _WANTED_P, _LOG_MIN_P = (tl.constexpr(word) for word in (at.WANTED_K, at.WANTED_P, at.LOG_MIN_P))

_NEVER = tl.constexpr(-1e30)  # a forbidden token's: finite even divided by the coldest temperature, since inf breaks a row
_HOPELESS = tl.constexpr(HOPELESS)  # between that and all others
_UNIT = tl.constexpr(1 << 40)  # the mass of the best token: 2**18 of them fit an int64
_REACH = tl.constexpr(30)  # a token this far below the best, in nats, has no mass: exp(-30) < 2**-41
_COLUMNS, _CANDIDATES = tl.constexpr(COLUMNS), tl.constexpr(CANDIDATES)
_DEEP = 4  # times _COLUMNS: the tile in which rows are read


@jit
def _floats(rule_ptr, at):
    return tl.load(rule_ptr + at).to(tl.float32, bitcast=True)


@jit
def _key(x):
    """float32 -> int64 in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@jit
def _value(key):
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def _weight(x_ptr, size, limit, best, MASS: tl.constexpr):
    """Of x [size], the values >= limit: their number, or their mass in units."""
    lane = tl.arange(0, _COLUMNS)
    total = tl.zeros([_COLUMNS], tl.int64)
    for start in tl.range(0, size, _COLUMNS, loop_unroll_factor=4):
        inside = start + lane < size
        x = tl.load(x_ptr + start + lane, mask=inside, other=float("-inf"))
        counted = inside & (x >= limit)
        if MASS:
            total += tl.where(counted, (tl.exp(x - best) * _UNIT + 0.5).to(tl.int64), 0)
        else:
            total += counted.to(tl.int64)
    return tl.sum(total, axis=0)


@jit
def _threshold(x_ptr, size, low, best, need, MASS: tl.constexpr):
    """The largest t from low to best with weight(x >= t) >= need, if low is one. (Of counts, any t that separates the same.)"""
    lo, hi = _key(low), _key(best) + 1
    while hi - lo > 1:
        middle = (lo + hi) >> 1
        weight = _weight(x_ptr, size, _value(middle), best, MASS)
        lo = tl.where(weight >= need, middle, lo)
        hi = tl.where(weight >= need, hi, middle)
        if not MASS:
            hi = tl.where(weight == need, middle + 1, hi)
    return _value(lo)


@jit
def _floor(column_ptr, size, low, best, need, MASS: tl.constexpr):
    """A lower bound of the row's threshold: that of its column maxima, if they weigh enough."""
    floor = best * 0 + _HOPELESS
    if _weight(column_ptr, size, low, best, MASS) >= need:
        floor = _threshold(column_ptr, size, low, best, need, MASS)
    return floor


@jit
def _share(p, mass):
    """The least number of units that is p of `mass`, and not nothing."""
    return tl.maximum(tl.ceil(p.to(tl.float64) * mass.to(tl.float64)).to(tl.int64), 1)


@jit
def _load_tiles(ptr, start, V: tl.constexpr, DEEP: tl.constexpr):
    """DEEP tiles from `start` of a row: loads that do not wait for each other, nor for what is done with the tiles."""
    tiles = ()
    for deep in tl.static_range(DEEP):
        j = tl.arange(0, _COLUMNS) + start + deep * _COLUMNS
        tiles = tiles + (tl.load(ptr + j, mask=j < V, other=0),)  # type: ignore[assignment]
    return tiles


@jit
def _gather(row_ptr, candidate_ptr, floor, V: tl.constexpr, DEEP: tl.constexpr):
    """Collect what is >= floor, column by column, if there is room for it. Returns how much it is."""
    column = tl.arange(0, _COLUMNS)
    counts = tl.zeros([_COLUMNS], tl.int32)
    for start in range(0, V, DEEP * _COLUMNS):
        tiles = _load_tiles(row_ptr, start, V, DEEP)
        for deep in tl.static_range(DEEP):
            counts += ((column + start + deep * _COLUMNS < V) & (tiles[deep] >= floor)).to(tl.int32)
    found = tl.sum(counts, axis=0)
    if found <= _CANDIDATES:
        place = tl.cumsum(counts, axis=0) - counts
        for start in range(0, V, DEEP * _COLUMNS):
            tiles = _load_tiles(row_ptr, start, V, DEEP)
            for deep in tl.static_range(DEEP):
                kept = (column + start + deep * _COLUMNS < V) & (tiles[deep] >= floor)
                tl.store(candidate_ptr + place, tiles[deep], mask=kept)
                place += kept.to(tl.int32)
        tl.debug_barrier()
    return found


@jit
def _edit(row_ptr, rule_ptr, counts_ptr, flags, position, V: tl.constexpr, DEEP: tl.constexpr):
    """Bias, penalties, stop ids. What is not finite stays so: sample.py looks for it."""
    if (flags & _BIAS) != 0:
        entry = tl.arange(0, _MAX_LOGIT_BIAS)
        inside = entry < tl.load(rule_ptr + _BIAS_COUNT)
        ids = tl.load(rule_ptr + _BIAS_IDS + entry, mask=inside, other=0)
        value = tl.load(rule_ptr + _BIAS_VALUES + entry, mask=inside, other=0).to(tl.float32, bitcast=True)
        x = tl.load(row_ptr + ids, mask=inside, other=0.0)
        tl.store(row_ptr + ids, x + value, mask=inside)
        tl.debug_barrier()
    if (flags & _PENALTIES) != 0:
        repetition = _floats(rule_ptr, _REPETITION)
        presence, frequency = _floats(rule_ptr, _PRESENCE), _floats(rule_ptr, _FREQUENCY)
        for start in range(0, V, DEEP * _COLUMNS):
            tiles, counts = _load_tiles(row_ptr, start, V, DEEP), _load_tiles(counts_ptr, start, V, DEEP)
            for deep in tl.static_range(DEEP):
                j = tl.arange(0, _COLUMNS) + start + deep * _COLUMNS
                x, output = tiles[deep], counts[deep] >> 1
                x = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
                x = x - frequency * output.to(tl.float32) - tl.where(output > 0, presence, 0.0)
                tl.store(row_ptr + j, x, mask=(j < V) & (counts[deep] > 0))
        tl.debug_barrier()
    if ((flags & _STOPS) != 0) & (position + 1 < tl.load(rule_ptr + _FIRST_STOP)):
        entry = tl.arange(0, _MAX_STOPS)
        inside = entry < tl.load(rule_ptr + _STOP_COUNT)
        ids = tl.load(rule_ptr + _STOP_IDS + entry, mask=inside, other=0)
        x = tl.load(row_ptr + ids, mask=inside, other=0.0)
        tl.store(row_ptr + ids, _NEVER, mask=inside & (x - x == 0))
        tl.debug_barrier()


@jit
def _mask(row_ptr, mask_ptr, V: tl.constexpr, DEEP: tl.constexpr):
    """Forbid what has no bit."""
    for start in range(0, V, DEEP * _COLUMNS):
        tiles = _load_tiles(row_ptr, start, V, DEEP)
        words = ()
        for deep in tl.static_range(DEEP):
            j = tl.arange(0, _COLUMNS) + start + deep * _COLUMNS
            words = words + (tl.load(mask_ptr + (j >> 5), mask=j < V, other=0),)  # type: ignore[assignment]
        for deep in tl.static_range(DEEP):
            j = tl.arange(0, _COLUMNS) + start + deep * _COLUMNS
            forbidden = ((words[deep] >> (j & 31)) & 1) == 0
            tl.store(row_ptr + j, _NEVER, mask=(j < V) & forbidden & (tiles[deep] - tiles[deep] == 0))
    tl.debug_barrier()


@jit
def _cut(row_ptr, rule_ptr, column_ptr, candidate_ptr, flags, temperature, V: tl.constexpr, DEEP: tl.constexpr):
    """Divide by the temperature; returns the threshold of what is left of the row."""
    column = tl.arange(0, _COLUMNS)
    columns = tl.full([_COLUMNS], float("-inf"), tl.float32)
    hopeful = tl.zeros([_COLUMNS], tl.int32)
    for start in range(0, V, DEEP * _COLUMNS):
        tiles = _load_tiles(row_ptr, start, V, DEEP)
        for deep in tl.static_range(DEEP):
            j = column + start + deep * _COLUMNS
            x = tl.div_rn(tiles[deep], temperature)
            tl.store(row_ptr + j, x, mask=j < V)
            columns = tl.maximum(columns, tl.where(j < V, x, float("-inf")))
            hopeful += ((j < V) & (x > _HOPELESS)).to(tl.int32)
    size: tl.constexpr = _COLUMNS if _COLUMNS < V else V
    tl.store(column_ptr + column, columns)
    best = tl.max(columns, axis=0)
    shallowest = tl.min(tl.where(column < size, columns, best), axis=0)
    tl.debug_barrier()

    p = _floats(rule_ptr, _WANTED_P)
    k = tl.minimum(tl.load(rule_ptr + _WANTED_K), tl.maximum(tl.sum(hopeful, axis=0), 1)).to(tl.int64)
    limit = best * 0 + _HOPELESS
    floor = limit
    mass = k * 0
    if (flags & _TOP_K) != 0:
        floor = _floor(column_ptr, size, tl.maximum(shallowest, _HOPELESS), best, k, False)
    elif (flags & _TOP_P) != 0:
        mass = _weight(row_ptr, V, best - _REACH, best, True)
        floor = _floor(column_ptr, size, best - _REACH, best, _share(p, mass), True)
    source, size_left = row_ptr, k.to(tl.int32) * 0 + V
    if (flags & (_TOP_K | _TOP_P)) != 0:
        found = _gather(row_ptr, candidate_ptr, floor, V, DEEP)
        if found <= _CANDIDATES:
            source, size_left = candidate_ptr, found
    if (flags & _TOP_K) != 0:
        limit = _threshold(source, size_left, floor, best, k, False)
        if (flags & _TOP_P) != 0:
            mass = _weight(source, size_left, limit, best, True)
    if (flags & _TOP_P) != 0:
        low = tl.maximum(tl.maximum(limit, floor), best - _REACH)
        limit = _threshold(source, size_left, low, best, _share(p, mass), True)
    if (flags & _MIN_P) != 0:
        limit = tl.maximum(limit, best + _floats(rule_ptr, _LOG_MIN_P))
    return limit


@jit(do_not_specialize_on_alignment=["rows_ptr", "places_ptr"])  # a prefill graph's lies between other arrays
def _kernel(
    logits_ptr, rows_ptr, position_ptr, temperature_ptr, rules_ptr, counts_ptr, column_ptr, candidate_ptr, limit_ptr,
    places_ptr, masks_ptr, V: tl.constexpr, WORDS: tl.constexpr, DEEP: tl.constexpr, OF_HELD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(rows_ptr + row)  # rows and rules come from the host: no kernel of a step writes them
    rule_ptr = rules_ptr + slot * _RULES
    flags = tl.load(rule_ptr)
    follow(PDL)
    limit = float("-inf")
    if (flags != 0) & (((flags & _HELD) != 0) == OF_HELD):
        row_ptr = logits_ptr + (tl.load(places_ptr + row) if OF_HELD else row) * V
        _edit(row_ptr, rule_ptr, counts_ptr + slot * V, flags, tl.load(position_ptr + slot), V, DEEP)
        if OF_HELD:
            _mask(row_ptr, masks_ptr + row * WORDS, V, DEEP)
        if (flags & (_TOP_K | _TOP_P | _MIN_P)) != 0:
            limit = _cut(row_ptr, rule_ptr, column_ptr + row * _COLUMNS, candidate_ptr + row * _CANDIDATES, flags,
                         tl.load(temperature_ptr + slot), V, DEEP)  # fmt: skip
    tl.store(limit_ptr + row, limit)


def restrict(logits: torch.Tensor, rows: torch.Tensor, state: DecodeState, space: SampleSpace, *, pdl: bool,
             held: HeldRows | None = None) -> None:  # fmt: skip
    """logits float32 [M, vocab], of slots `rows` int64 [M], and space.limit [M] become what `sample` draws from. held: as
    `sample` takes it."""
    vocab = logits.shape[1]
    deep = min(_DEEP, next_power_of_2(cdiv(vocab, COLUMNS)))
    _kernel[(len(rows),)](
        logits, rows, state.position, state.temperature, state.rules, state.counts, space.columns, space.candidates,
        space.limit, rows if held is None else held.places, state.rules if held is None else held.masks, V=vocab,
        WORDS=cdiv(vocab, 32), DEEP=deep, OF_HELD=held is not None, PDL=pdl, num_warps=16, enable_fp_fusion=False,
        **launch_options(pdl))  # fmt: skip


def restrict_torch(logits: torch.Tensor, rows: torch.Tensor, state: DecodeState, space: SampleSpace,
                   held: HeldRows | None = None) -> None:  # fmt: skip
    """Reference: by sorting, with masses in float64."""
    for row, slot in enumerate(rows.tolist()):
        rule, numbers = state.rules[slot], state.rules[slot].view(torch.float32)
        x = logits[row if held is None else held.places[row]]
        flags = int(rule[0])
        if (flags & at.HELD > 0) != (held is not None):
            continue
        if flags & at.BIAS:
            ids, values = rule[at.BIAS_IDS:at.BIAS_VALUES], numbers[at.BIAS_VALUES:at.RULES]
            x.index_add_(0, ids[: rule[at.BIAS_COUNT]], values[: rule[at.BIAS_COUNT]])
        if flags & at.PENALTIES:
            count = state.counts[slot]
            factor, output = torch.where(count > 0, numbers[at.REPETITION], 1.0), count >> 1
            x.copy_(torch.where(x > 0, x / factor, x * factor))
            x -= numbers[at.FREQUENCY] * output
            x -= numbers[at.PRESENCE] * (output > 0)
        if flags & at.STOPS and state.position[slot] + 1 < rule[at.FIRST_STOP]:
            ids = rule[at.STOP_IDS:at.BIAS_IDS][: rule[at.STOP_COUNT]].long()
            x[ids] = torch.where(x[ids].isfinite(), -1e30, x[ids])
        if held is not None:
            bits = held.masks[row, :, None] >> torch.arange(32, device=x.device) & 1
            x[(bits.ravel()[: len(x)] == 0) & x.isfinite()] = -1e30
        space.limit[row] = -torch.inf
        if flags & (at.TOP_K | at.TOP_P | at.MIN_P):
            x /= state.temperature[slot]
            ordered = x.sort(descending=True).values
            if flags & at.TOP_K:
                k = min(int(rule[at.WANTED_K]), max(1, int((ordered > HOPELESS).sum())))
                ordered = ordered[ordered >= ordered[k - 1]]
            if flags & at.TOP_P:
                mass = torch.softmax(ordered.double(), 0).cumsum(0)
                ordered = ordered[: 1 + int((mass < numbers[at.WANTED_P] * mass[-1]).sum())]
            space.limit[row] = ordered[-1]
            if flags & at.MIN_P:
                space.limit[row] = max(ordered[-1], ordered[0] + numbers[at.LOG_MIN_P])


def bytes_moved(vocab: int, *, penalties: bool) -> int:
    """Of one row that is cut: read and written scaled, read twice to gather; before, read and written with its counts."""
    return vocab * (16 + (12 if penalties else 0))


def flops(vocab: int, *, penalties: bool) -> int:
    """Of one row that is cut: a division, three comparisons; before, a division, two products and four sums."""
    return vocab * (4 + (7 if penalties else 0))
