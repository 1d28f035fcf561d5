"""Numbers between bounds, as grammars over their decimal digits.

Numbers have at most 15 significant digits, so that a reader that keeps 64-bit floats sees them as they were meant: two such
numbers that differ as decimals differ as floats (IEEE 754, DBL_DIG).
"""

from __future__ import annotations

from decimal import Decimal

from model_core.grammar.ebnf import NOTHING, either, repeated

DIGITS = 15
INTEGER = f'("0" | "-"? [1-9] [0-9]{{0,{DIGITS - 1}}})'
NUMBER = '("-"? ("0" | [1-9] [0-9]{0,9}) ("." [0-9]{1,5})? ([eE] [-+]? [0-9]{1,2})?)'

Bound = tuple[Decimal, bool]  # its value, and whether that itself is left out


def integers(low: int | None, high: int | None) -> str | None:
    """Integers from low to high, both |.| < 10**15; None if there are none."""
    if low is not None and high is not None and low > high:
        return None
    parts = []
    if low is None or low < 0:
        least = 1 if high is None or high >= 0 else -high
        parts += [f'"-" {part}' for part in _whole(least, 10**DIGITS - 1 if low is None else -low)]
    if high is None or high >= 0:
        parts += _whole(max(low or 0, 0), 10**DIGITS - 1 if high is None else high)
    return either(parts) if parts else None


def numbers(low: Bound | None, high: Bound | None) -> str | None:
    """Decimals without an exponent between two bounds; None if there are none."""
    if low and high and (low[0] > high[0] or (low[0] == high[0] and (low[1] or high[1]))):
        return None
    parts = []
    zero = Decimal(0)
    if low is None or low[0] < 0:
        least = (zero, True) if high is None or high[0] > 0 else (-high[0], high[1] or not high[0])
        parts += [f'"-" {part}' for part in _positive(least, None if low is None else (-low[0], low[1]))]
    if high is None or high[0] >= 0:
        parts += _positive((zero, False) if low is None or low[0] < 0 else low, high)
    return either(parts) if parts else None


def _positive(low: Bound, high: Bound | None) -> list[str]:
    """Decimals from 0 on: what is before the point decides, or is one of the bounds' and what is behind it decides."""
    first, below = _split(low[0])
    last, above = _split(high[0]) if high else (10**DIGITS, "")
    room = DIGITS - max(len(str(first)), len(str(last)) if high else 1, 1)
    behind = max(1, min(room, 9, max(6, len(below) + 1, len(above) + 1)))
    parts = []
    if first == last and high:
        parts += _fraction(str(first), below, low[1], above, high[1], behind)
    else:
        parts += _fraction(str(first), below, low[1], None, False, behind)
        anything = f'("." [0-9]{{1,{behind}}})?'
        whole = 10 ** (DIGITS - behind) - 1 if high is None else last - 1
        parts += [f"{part} {anything}" for part in _whole(first + 1, whole)]
        if high:
            parts += _fraction(str(last), "", False, above, high[1], behind)
    return parts


def _fraction(whole: str, below: str, over: bool, above: str | None, under: bool, most: int) -> list[str]:
    """Decimals that begin with these digits and have at most `most` behind the point."""
    parts = [f'"{whole}" "." {digits}' for digits in _digits(below, over, above, under, most)]
    is_low = not below.strip("0")
    is_high = above is not None and not above.strip("0")
    if is_low and not over and not (is_high and under):
        parts.append(f'"{whole}"')
    return parts


def _digits(below: str, over: bool, above: str | None, under: bool, most: int) -> list[str]:
    """1 to `most` digits of a fraction from .below (beyond it, if over) to .above (short of it, if under; None: no bound)."""
    if most == 0:
        return []
    least, greatest = int(below[:1] or "0"), int(above[:1] or "0") if above is not None else 9
    rest = repeated("[0-9]", 0, most - 1)
    if not below and above is None:
        if not over:
            return [_after("[0-9]", rest)]
        return [_after("[1-9]", rest), *(f'"0" {part}' for part in _digits("", True, None, False, most - 1))]
    parts = []
    for digit in range(least, greatest + 1):
        at_low, at_high = digit == least, above is not None and digit == greatest
        next_low, next_high = below[1:] if at_low else "", above[1:] if at_high and above else ("" if at_high else None)
        next_over, next_under = over and at_low, under and at_high
        if not at_low and not at_high:
            continue  # taken together below
        ends = (not at_low or (not next_low.strip("0") and not next_over)) and (
            not at_high or not (next_under and not (next_high or "").strip("0")))
        tails = _digits(next_low, next_over, next_high, next_under, most - 1)
        parts += [f'"{digit}" {tail}' for tail in tails] + ([f'"{digit}"'] if ends else [])
    between = range(least + 1, greatest if above is not None else greatest + 1)
    if len(between):
        parts.append(_after(_digit(between[0], between[-1]), rest))
    return parts


def _after(first: str, rest: str) -> str:
    return first if rest == NOTHING else f"{first} {rest}"


def _whole(low: int, high: int) -> list[str]:
    """Integers 0 <= low to high, digit by digit."""
    parts = []
    while low <= high:
        size = len(str(low))
        end = min(high, 10**size - 1)
        parts += _same_size(str(low), str(end))
        low = end + 1
    return parts


def _same_size(low: str, high: str) -> list[str]:
    """Integers between two that have as many digits."""
    if not low:
        return [NOTHING]
    first, last, rest = int(low[0]), int(high[0]), len(low) - 1
    lowest, highest = "0" * rest, "9" * rest
    if first == last:
        return [_joined(f'"{first}"', part) for part in _same_size(low[1:], high[1:])]
    parts = []
    if low[1:] != lowest:
        parts += [_joined(f'"{first}"', part) for part in _same_size(low[1:], highest)]
        first += 1
    ending = []
    if high[1:] != highest:
        ending = [_joined(f'"{last}"', part) for part in _same_size(lowest, high[1:])]
        last -= 1
    if first <= last:
        parts.append(_joined(_digit(first, last), repeated("[0-9]", rest, rest)))
    return parts + ending


def _joined(digit: str, rest: str) -> str:
    return digit if rest == NOTHING else f"{digit} {rest}"


def _digit(low: int, high: int) -> str:
    return f'"{low}"' if low == high else f"[{low}-{high}]"


def _split(value: Decimal) -> tuple[int, str]:
    """Before and behind the point, of a decimal that is not negative."""
    whole, _, fraction = f"{value:f}".partition(".")
    return int(whole), fraction.rstrip("0")
