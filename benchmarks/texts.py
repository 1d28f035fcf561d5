"""Texts that a grammar allows, and made-up vocabularies that write them.

Vocabularies are made up of bytes, JSON's punctuation and words of random letters, with the lengths of real ones.
"""

from __future__ import annotations

import random

from model_core.grammar.matcher import Vocabulary
from model_core.grammar.spec import GrammarSpec, of_json_object, of_regex, of_schema

EOS = 0
_SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string"}, "summary": {"type": "string"}, "price": {"type": "number"}, "count": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}}, "kind": {"enum": ["book", "film", "song"]},
        "parts": {"type": "array", "items": {"type": "object", "required": ["name", "size"], "properties": {
            "name": {"type": "string"}, "size": {"type": "integer"}}}},
    },
    "required": ["title", "summary", "price", "count", "tags", "kind", "parts"],
}  # fmt: skip
_TEXT = (
    '{"title": "The sea is wide", "summary": "A small boat goes out in the early morning to look for fish near the old stones, '
    'and the man in it is sixty years old.", "price": 12.5, "count": 120, "tags": ["sea", "old man", "storm"], "kind": "book", '
    '"parts": [{"name": "The pier", "size": 12}, {"name": "The mast", "size": 7}, {"name": "Yesterday\'s storm", "size": 31}]}'
)
GRAMMARS: dict[str, tuple[GrammarSpec, str]] = {
    "json_object": (of_json_object("response_format"), _TEXT),
    "json_schema": (of_schema(_SCHEMA, "response_format"), _TEXT),
    "regex": (of_regex(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (INFO|WARN) [a-z]+: [A-Za-z0-9 ,.]+", "structured_outputs.regex"),
              "2026-11-25T10:00:00Z WARN engine: The sea is wide, and a small boat goes out early to look for fish."),
}


def made_up(size: int) -> list[bytes]:
    """Tokens: end of text (EOS), bytes, punctuation, numbers up to 999, words with and without a space before them."""
    chance = random.Random(0)
    found = dict.fromkeys([b"", *(bytes([i]) for i in range(256))])
    found |= dict.fromkeys((a + b).encode() for a in '"}],:. \n' for b in '" ,{[}]')
    found |= dict.fromkeys(text.encode() for number in range(1000) for text in (str(number), f" {number}"))
    found |= dict.fromkeys(word.encode() for word in _TEXT.replace('"', " ").split())
    found |= dict.fromkeys(b" " + word for word in list(found) if word.isalpha())
    letters = "eeeetttaaaooiinnsshhrrdlcumwfgypbvkjxqz"
    while len(found) < size:
        word = "".join(chance.choices(letters, k=min(14, 2 + int(chance.expovariate(0.25)))))
        if chance.random() < 0.03:
            word = chr(chance.randrange(0xC0, 0x2FFF)) + word[:2]
        found[chance.choice((word, f" {word}", f" {word}", f" {word.capitalize()}")).encode()] = None
    return list(found)[:size]


def numbers_of(vocabulary: Vocabulary) -> dict[bytes, int]:
    return {token: number for number, token in enumerate(vocabulary.tokens) if token}


def tokens_of(text: str, numbers: dict[bytes, int]) -> list[int]:
    """Longest tokens first. numbers: of the vocabulary's texts."""
    data, at, ids = text.encode(), 0, []
    while at < len(data):
        size = next(size for size in range(20, 0, -1) if data[at : at + size] in numbers)
        ids.append(numbers[data[at : at + size]])
        at += size
    return ids


def endless(name: str, row: int, tokens: int, numbers: dict[bytes, int]) -> list[int]:
    """A text of at least so many tokens that its grammar allows, in which each row is at another place."""
    text, more = GRAMMARS[name][1], " old" * row
    if name == "regex":
        text = text.replace("The sea", f"The{more} sea") + text[text.index("The sea") :] * (tokens // 8)
    else:
        text = text.replace("The sea", f"The{more} sea")[: text.rindex("]") + len(more)]
        text += "".join(f', {{"name": "Stone and water {number}", "size": {number}}}' for number in range(tokens // 8))
    found = tokens_of(text, numbers)
    assert len(found) >= tokens
    return found[:tokens]
