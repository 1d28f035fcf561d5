"""Arrays of a JSON document."""

from __future__ import annotations

from collections.abc import Callable

from model_core.grammar.ebnf import NOTHING
from model_core.grammar.part import Part
from model_core.grammar.series import MAX_ITEMS, items


def array(part: Part, inner: Callable[[Part], str]) -> str:
    """inner: the name of the rule for a value in it. Raises RequestError."""
    node = part.node
    low, high = part.counts("minItems", "maxItems", MAX_ITEMS)
    prefix = node.get("prefixItems", [])
    first = [inner(part.child(one, "prefixItems", i)) for i, one in enumerate(prefix)] if isinstance(prefix, list) else []
    if "prefixItems" in node and not first:
        part.refuse("what is no list of schemas", "prefixItems")
    if high is not None and high < len(first):
        part.refuse("fewer items than 'prefixItems'", "maxItems")
    rest = node.get("items", not first)
    if rest is False and low > len(first):
        part.refuse("more items than 'prefixItems' without 'items'", "minItems")
    item = NOTHING if rest is False or high == len(first) else inner(part.child(rest, "items"))
    return f'"[" {items(first, item, max(0, low - len(first)), None if high is None else high - len(first))} "]"'
