"""Values in a row with ", " between them: the items of an array, the members of an object."""

from __future__ import annotations

from model_core.grammar.ebnf import NOTHING, Rules, either, joined, repeated

MAX_ITEMS = 1000  # that a bound on their number may name


def items(first: list[str], item: str, low: int, high: int | None) -> str:
    """`first`, then low to high times `item`."""
    if item == NOTHING or high == 0:
        return ' ", " '.join(first) or NOTHING
    if first:
        more = repeated(f'(", " {item})', low, high)
        return ' ", " '.join(first) + f" {more}"
    more = repeated(f'(", " {item})', max(0, low - 1), None if high is None else high - 1)
    some = joined(item, more)
    return some if low else f"({some})?"


def members(rules: Rules, parts: list[tuple[str, bool]], low: int, high: int | None) -> str | None:
    """The inside of an object with low to high members, None if there is none. parts: of each property how it is written, and
    whether it must be there.

    after[k]: what may follow the properties so far if k of them were written (as far as that matters), None if nothing
    can. Built from the last property to the first.
    """
    most = max(1, low) if high is None else max(1, low, high)
    after: list[str | None] = [NOTHING if k >= low else None for k in range(most + 1)]
    for written, must in reversed(parts):
        before: list[str | None] = []
        for k in range(most + 1):
            options = []
            follows = after[min(k + 1, most)] if high is None or k < high else None
            if follows is not None:
                options.append(joined('", "' if k else NOTHING, written, follows))
            if not must and (rest := after[k]) is not None:
                options.append(rest)
            before.append(rules.add(either(options)) if options else None)
        after = before
    return after[0]
