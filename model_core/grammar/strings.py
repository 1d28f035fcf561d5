"""Strings of a JSON document: of a length, a pattern or a format."""

from __future__ import annotations

from model_core.grammar.ebnf import MAX_REPEAT, Rules, counted, one_of
from model_core.grammar.formats import FORMATS
from model_core.grammar.part import Part
from model_core.grammar.pattern import ESCAPED_IN_JSON, PLAIN_IN_JSON, pattern_grammar

MAX_LENGTH = MAX_REPEAT  # of a string with a bound on its length
_PLAIN = one_of(PLAIN_IN_JSON)
STRING = f'"\\"" ({_PLAIN} | {ESCAPED_IN_JSON})* "\\""'


def string(part: Part, rules: Rules) -> str:
    """Raises RequestError if its keywords say more than one of the three."""
    node = part.node
    low, high = part.counts("minLength", "maxLength", MAX_LENGTH)
    bounded = low > 0 or high is not None
    if "pattern" in node:
        if bounded or "format" in node:
            part.refuse("'pattern' together with a length or a format", "pattern")
        if not isinstance(node["pattern"], str):
            part.refuse("what is no string", "pattern")
        return matching(node["pattern"], part, rules, "pattern")
    if "format" in node:
        kind = node["format"]
        if bounded:
            part.refuse("'format' together with a length", "format")
        if not isinstance(kind, str) or kind not in FORMATS:
            part.refuse(f"format {kind!r}, not one of {', '.join(sorted(FORMATS))},", "format")
        return matching(FORMATS[kind], part, rules, "pattern")
    if not bounded:
        return rules.add(STRING)
    return rules.add(f'"\\"" {counted(rules, _PLAIN, low, high, beyond=0)} "\\""')  # rules that all strings share


def matching(pattern: str, part: Part, rules: Rules, key: str) -> str:
    """A string that a pattern matches. Raises RequestError for one that could not be enforced. key: where it stands."""
    return f'"\\"" {pattern_grammar(pattern, part.where(key), rules, part.param, json=True)} "\\""'
