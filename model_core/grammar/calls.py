"""Calls of tools as grammars: alone, in free text, or in place of an answer of another form."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from model_core.grammar.ebnf import ANY, MARKS, NOTHING, Rules, either, joined, marked_literal, one_of, without
from model_core.grammar.pattern import ESCAPED_IN_JSON, PLAIN_IN_JSON
from model_core.grammar.schema import keywords_grammar, schema_grammar
from model_core.grammar.spec import Apart, GrammarSpec, bounded


class Call(NamedTuple):
    """A call of one tool, as the model writes it: prefix, its arguments, suffix. keywords: they are not a JSON object, but
    written by name as in Python."""

    prefix: str
    schema: Any
    suffix: str
    keywords: bool = False


class Control(NamedTuple):
    """A control token. Ordinary tokens may spell its text, too; where a grammar's texts have it, the token itself is meant."""

    id: int
    text: str


@dataclass(frozen=True)
class Block:
    """begin, one of the calls, for each further one `between` and it, end. between None: one call a block.

    control: control tokens of the model; those that are in the texts are written as such.

    Hermes: Call('<tool_call>\\n{"name": "f", "arguments": ', schema, "}\\n</tool_call>"), between="\\n".
    Llama 3: Call('{"name": "f", "parameters": ', schema, "}"), between="; ".
    Mistral: Call('{"name": "f", "arguments": ', schema, "}"), begin="[TOOL_CALLS][", between=", ", end="]";
    since 2025: Call("[TOOL_CALLS]f[ARGS]", schema, ""), between="".
    Pythonic: Call("f(", schema, ")", keywords=True), begin="[", between=", ", end="]".
    """

    calls: tuple[Call, ...]
    begin: str = ""
    between: str | None = None
    end: str = ""
    control: tuple[Control, ...] = ()

    def __post_init__(self) -> None:
        assert self.calls, "no tool to call"
        assert len(self.used) <= len(MARKS)

    @cached_property
    def used(self) -> tuple[Control, ...]:
        """The control tokens that are in the texts."""
        around = [self.begin, self.between or "", self.end]
        texts = [*around, *(text for call in self.calls for text in (call.prefix, call.suffix))]
        return tuple(one for one in self.control if any(one.text in text for text in texts))

    @property
    def marks(self) -> tuple[int, ...]:
        return tuple(one.id for one in self.used)

    @property
    def beginnings(self) -> tuple[str, ...]:
        """As clients see them."""
        return tuple(self.begin + call.prefix for call in self.calls)

    def literal(self, text: str) -> str:
        for mark, one in zip(MARKS, self.used, strict=False):
            text = text.replace(one.text, mark)
        return marked_literal(text) if text else NOTHING

    def body(self, rules: Rules, param: str, after: str = "") -> str:
        """The grammar of a block, of which `after`, a beginning, has been written."""
        first, further = [], []
        for call in self.calls:
            arguments = (keywords_grammar if call.keywords else schema_grammar)(call.schema, param, rules)
            rest = joined(arguments, self.literal(call.suffix))
            first.append(joined(self.literal((self.begin + call.prefix).removeprefix(after)), rest))
            further.append(joined(self.literal(call.prefix), rest))
        more = NOTHING if self.between is None else f"({joined(self.literal(self.between), rules.add(either(further)))})*"
        return joined(rules.add(either(first)), more, self.literal(self.end))


def of_calls(block: Block, param: str) -> GrammarSpec:
    """A block and nothing else. Raises RequestError like of_schema, as all of these."""
    rules = Rules()
    return bounded(rules.text(block.body(rules, param)), param, block.marks)


def of_text_with_calls(block: Block, param: str, trigger: str, *, several: bool) -> GrammarSpec:
    """Any text, or none, with blocks in it (several: more than one; else the answer ends with it). trigger: a beginning of all
    blocks, with which nothing else in the text begins; one of control tokens is not spelled out there either."""
    rules = Rules()
    body = rules.add(block.body(rules, param, trigger))
    options = [f"loop_after_dispatch={str(several).lower()}"]
    never = [marked_literal(one.text) if one.text in trigger else block.literal(one.text) for one in block.used]
    if never:
        options.append(f"excludes=({', '.join(never)})")
    return bounded(rules.text(f"TagDispatch(({block.literal(trigger)}, {body}), {', '.join(options)})"), param, block.marks)


def of_text_or_calls(block: Block, param: str, never: str) -> GrammarSpec:
    """A block, or a text, which may be empty; it does not begin with a character of `never`."""
    rules = Rules()
    first = one_of(without(ANY, sorted((ord(c), ord(c)) for c in never)))
    rest = rules.add("TagDispatch(loop_after_dispatch=false)")
    return bounded(rules.text(either([block.body(rules, param), f"{first} {rest}", NOTHING])), param, block.marks)


def of_object_apart(name: str, param: str) -> GrammarSpec:
    """Any JSON object whose first member has another name (of letters): what json_object means where calls begin so."""
    rules = Rules()
    value = schema_grammar(True, param, rules)
    rest = rules.add(f'({one_of(PLAIN_IN_JSON)} | {ESCAPED_IN_JSON})* "\\""')
    first = rules.add(f"({one_of(PLAIN_IN_JSON)} | {ESCAPED_IN_JSON}) {rest}")  # behind the name: something more
    for c in reversed(name):
        others = either([one_of(without(PLAIN_IN_JSON, [(ord(c), ord(c))])), ESCAPED_IN_JSON])
        first = rules.add(either([f'"{c}" {first}', f"{others} {rest}", '"\\""']))
    members = f'"\\"" {first} ": " {value} (", " "\\"" {rest} ": " {value})*'
    return bounded(rules.text(f'"{{" ({members})? "}}"'), param)


def of_answer_or_calls(answer: GrammarSpec, block: Block, param: str) -> GrammarSpec:
    """A block, or what another grammar says: not one of a client's own, and nothing that begins as a block does, which is
    found when it is compiled."""
    known, line_end, said = answer.text.rpartition("\n")
    rules = Rules("c")
    text = rules.text(f"({said.removeprefix('root ::= ')}) | ({block.body(rules, param)})")
    return bounded(f"{known}{line_end}{text}", answer.param, block.marks, Apart(answer.text, block.beginnings))
