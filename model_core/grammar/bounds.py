"""The bounds of a schema's numbers."""

from __future__ import annotations

import math
from decimal import Decimal

from model_core.grammar.ebnf import Rules
from model_core.grammar.number import DIGITS, INTEGER, NUMBER, Bound, integers, numbers
from model_core.grammar.part import Part

BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_LOWS = ("minimum", "exclusiveMinimum")
_FURTHEST = Decimal(10**DIGITS - 1)


def number(part: Part, rules: Rules) -> str:
    """Raises RequestError if there is none between its bounds."""
    low, high = _bounds(part)
    if low is None and high is None:
        return rules.add(NUMBER)
    return numbers(low, high) or part.refuse("bounds without a number between them")


def integer(part: Part, rules: Rules) -> str:
    """Raises RequestError if there is none between its bounds."""
    low, high = _bounds(part)
    if low is None and high is None:
        return rules.add(INTEGER)
    least = None if low is None else math.floor(low[0]) + 1 if low[1] else math.ceil(low[0])
    most = None if high is None else math.ceil(high[0]) - 1 if high[1] else math.floor(high[0])
    return integers(least, most) or part.refuse("bounds without an integer between them")


def _bounds(part: Part) -> tuple[Bound | None, Bound | None]:
    """The narrower one on either side."""
    found: dict[str, Decimal] = {}
    for key in BOUNDS:
        if key in part.node:
            value = part.node[key]
            if type(value) not in (int, float) or not math.isfinite(value):
                part.refuse("a bound that is no number", key)
            exact, is_low = Decimal(repr(value)), key in _LOWS
            if exact > _FURTHEST if is_low else exact < -_FURTHEST:
                part.refuse(f"a bound with which all numbers have more than {DIGITS} digits", key)
            found[key] = max(-_FURTHEST, exact) if is_low else min(_FURTHEST, exact)  # no number is written beyond that
    lows = [(found[key], key != "minimum") for key in _LOWS if key in found]
    highs = [(found[key], key != "maximum") for key in ("maximum", "exclusiveMaximum") if key in found]
    return max(lows, default=None), min(highs, key=lambda bound: (bound[0], not bound[1]), default=None)
