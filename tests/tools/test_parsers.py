"""Parsers of calls: each family's forms, what is no call, and that no cutting of the text changes what is read."""

import json
from itertools import count

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deployments.tools.family import FAMILIES
from deployments.tools.json_scan import MAX_DEPTH, JsonScanner
from deployments.tools.pieces import Call, joined

NAMES = frozenset({"f", "get_weather"})


def read(family, parts, hidden=frozenset()):
    """Texts, and calls as (name, arguments, is_whole)."""
    ids = count()
    parser = FAMILIES[family].make(NAMES, hidden, lambda: str(next(ids)))
    pieces = [piece for part in parts for piece in parser.feed(part)] + parser.finish()
    blocks = joined(pieces)
    assert [block.id for block in blocks if isinstance(block, Call)] == [str(n) for n in range(next(ids))]
    return [(one.name, one.arguments, one.is_whole) if isinstance(one, Call) else one for one in blocks]


F1, W = ("f", '{"a": 1}', True), ("get_weather", "{}", True)


@pytest.mark.parametrize(("family", "text", "found"), [
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', [F1]),
    ("hermes", 'I see.\n\n<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>\n<tool_call>\n'
               '{"arguments": {}, "name": "get_weather"}</tool_call>\n', ["I see.", F1, W]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>\nDone.', [F1, "\nDone."]),
    ("hermes", '<tool_call>[{"name": "f", "arguments": {"a": 1}}, {"name": "get_weather"}]</tool_call> x', [F1, W, " x"]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [F1]),  # a string holds them
    ("hermes", '<tool_call>{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}</tool_call>', [F1]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}}\n</tool_call>', [F1]),  # a brace too many
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1},}</tool_call>', [F1]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}<tool_call>{"name": "get_weather"}', [F1, W]),  # never closed
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>{"}}</tool_call>',
     [("f", '{"a": "</tool_call>{"}', True)]),
    ("hermes", '<tool_call>{"name": "new", "arguments": {}}</tool_call>', [("new", "{}", True)]),  # the client knows better
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": o}}</tool_call>!', [("f", '{"a": o}}', False), "!"]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "cu', [("f", '{"a": "cu', False)]),
    *(("hermes", text, [text]) for text in (
        "", " \n", "<tool_call", "<tool_call>", "<tool_call> hm </tool_call>", "a </tool_call> b", "<tool_call>{}</tool_call>",
        '<tool_call>{"name": "f', '<tool_call>{"name": 3, "arguments": {}}', '<tool_call>{"name": "f", "arguments": [1]}',
        '<tool_call>{"name": "f", "arguments": "no"}', '<tool_call>{name: "f"}</tool_call> x', '{"name": "f", "arguments": {}}',
        '<tool_call>{"name": "\\ud800", "arguments": {}}')),
    ("llama3", '{"name": "f", "parameters": {"a": 1}}', [F1]),
    ("llama3", '<|python_tag|>{"name": "f", "arguments": {"a": 1}}; {"type": "function", "name": "get_weather", '
               '"parameters": {}}', [F1, W]),
    ("llama3", 'Sure: {"name": "f", "parameters": {"a": 1}} Ok?', ["Sure:", F1, " Ok?"]),
    ("llama3", '{"name": "f", "parameters": {"a": o}} and', [("f", '{"a": o}} and', False)]),
    *(("llama3", text, [text]) for text in (
        '{"name": "Bob", "parameters": {}}', '{"name": "f"}', '{"name": "f", "age": 3, "parameters": {}}', "{{{", "a {b} c",
        '{"name": "f", "parameters": [1]}', "<|python_tag|>print(1)", "if (x) { return {}; }",
        '{"name": "f", "parameters": "' + "x" * 2000 + '"}')),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "get_weather", "arguments": {}}]', [F1, W]),
    ("mistral", 'Hi. [TOOL_CALLS] [{"arguments": {"a": 1}, "name": "f"}]', ["Hi.", F1]),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]get_weather[CALL_ID]aB3[ARGS]{}', [F1, W]),
    ("mistral", '[TOOL_CALLS]f{"a": 1} Done {x}', [F1, " Done {x}"]),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"a": o}[TOOL_CALLS]get_weather{}', [("f", '{"a": o}', False), W]),
    *(("mistral", text, [text]) for text in (
        "[TOOL_CALLS]", "[TOOL_CALLS] no {call}", "[TOOL_CALL", "[TOOL_CALLS]f[ARGS]", "[1]")),
    ("pythonic", "[f(a=1)]", [F1]),
    ("pythonic", " [f(a=1), get_weather()]\n", [F1, W]),
    ("pythonic", "<|python_start|>[f(a=1), get_weather()]<|python_end|>", [F1, W]),
    ("pythonic", "[f(a='(\\'', b=[-1, 2.5e3], c={'d': (None, True)}, e=false)] ok",
     [("f", '{"a": "(\'", "b": [-1, 2500.0], "c": {"d": [null, true]}, "e": false}', True), " ok"]),
    ("pythonic", "[f(a=1), other(b=2)]", [F1, ", other(b=2)]"]),
    *(("pythonic", text, [text]) for text in (
        "[f(a=g())]", "[f(1)]", "[f(a=1, a=2)]", "[f(**{})]", "[f(a={1: 2})]", "[f(a=1e999)]", "[f(a=exit())]", "[f(a=1",
        "[1, 2]", "[]", "see [f(a=1)]", "[f(a=b'x')]", "[f(a=f'x')]", "[f(a='\\ud800')]", "[f(a=" + "[" * 40 + "]" * 40 + ")]",
        "[f(a=" + "9" * 5000 + ")]")),
])  # fmt: skip
def test_what_is_read(family, text, found):
    found = [one for one in found if one]
    assert read(family, [text]) == read(family, text) == found


def test_tags_that_are_control_tokens_are_never_content():
    for text, found in (("a <tool_call>{", ["a {"]), ("x</tool_call>", ["x"]), ("<tool_call>{} </tool_call>y", ["{} y"])):
        assert read("hermes", [text], frozenset(FAMILIES["hermes"].tags)) == found
    for text, found in (("[ARGS]a", ["a"]), ("[TOOL_CALLS]f[ARGS]", ["f"]), ("[TOOL_CALLS][ARGS] b", [" b"])):
        assert read("mistral", [text], frozenset(FAMILIES["mistral"].tags)) == found
    assert read("llama3", ["<|python_tag|>1+1"], frozenset(FAMILIES["llama3"].tags)) == ["1+1"]


BITS = [
    "<tool_call>", "</tool_call>", "<tool", "_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", '{"name": "f"',
    ', "arguments": ', ', "parameters": ', '{"a": 1}', '{"name": "f", "arguments": {}}', "}", "{", "[", "]", '"', "\\",
    "f(", ")", "a=1", ", ", ": ", "; ", "\n", " ", "x", "1", "true", "f", "get_weather", "é", "'", '"x', 'x"', "x" * 300,
]  # fmt: skip
TEXT = st.lists(st.sampled_from(BITS), max_size=20).map("".join)
CUTS = st.lists(st.integers(0, 400), max_size=12)


@settings(max_examples=400, deadline=None)
@given(text=TEXT, cuts=CUTS, family=st.sampled_from(sorted(FAMILIES)), hide=st.booleans())
@example('{"name": "f", "parameters": "' + "x" * 2000 + '"}', [1000], "llama3", False)
def test_no_cutting_changes_what_is_read(text, cuts, family, hide):
    hidden = frozenset(FAMILIES[family].tags) if hide else frozenset()
    whole = read(family, [text], hidden)
    assert read(family, text, hidden) == whole
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    assert read(family, [text[a:b] for a, b in zip(bounds, bounds[1:], strict=False)], hidden) == whole
    said = "".join(one for one in whole if isinstance(one, str))
    assert not any(tag in said for tag in hidden if "tool_call" not in tag)  # those the bits above may also spell out
    if len(whole) == 1 and said and not hide:
        assert said == text  # without a call nothing is lost
    for _, arguments, is_whole in (one for one in whole if not isinstance(one, str)):
        assert not is_whole or isinstance(json.loads(arguments), dict)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-999, 999) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    | st.sampled_from(["</tool_call>", "[TOOL_CALLS]", '"}', "\\"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab\"}é", max_size=3), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
ARGUMENTS = st.dictionaries(st.from_regex(r"[a-z_]{1,4}", fullmatch=True), JSON, max_size=3)
PYTHON = st.lists(st.tuples(st.sampled_from(sorted(NAMES)), ARGUMENTS), min_size=1, max_size=3)


def write(family, calls, ascii):
    texts = [json.dumps(arguments, ensure_ascii=ascii) for _, arguments in calls]
    pairs = [(name, text) for (name, _), text in zip(calls, texts, strict=True)]
    key = "parameters" if family == "llama3" else "arguments"
    objects = [f'{{"name": "{name}", "{key}": {text}}}' for name, text in pairs]
    if family == "hermes":
        return "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in objects)
    if family == "llama3":
        return "; ".join(objects)
    if family == "mistral":
        return "[TOOL_CALLS][" + ", ".join(objects) + "]"
    made = (f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})" for name, arguments in calls)
    return "[" + ", ".join(made) + "]"


@settings(max_examples=200, deadline=None)
@given(calls=PYTHON, ascii=st.booleans(), family=st.sampled_from(sorted(FAMILIES)), step=st.integers(1, 40))
def test_what_is_written_is_read(calls, ascii, family, step):
    text = write(family, calls, ascii)
    found = read(family, [text[at : at + step] for at in range(0, len(text), step)])
    assert [(name, json.loads(arguments)) for name, arguments, _ in found] == calls
    assert all(is_whole for *_, is_whole in found)
    if family != "pythonic":  # as the model wrote it
        assert [arguments for _, arguments, _ in found] == [json.dumps(arguments, ensure_ascii=ascii) for _, arguments in calls]


def test_arguments_go_out_while_they_come():
    parser = FAMILIES["hermes"].parser(NAMES)
    begun, first = parser.feed('<tool_call>{"name": "f", "arguments": {')
    assert (begun.index, begun.name, first.text) == (0, "f", "{")
    assert [piece.text for piece in parser.feed('"a": "some te')] == ['"a": "some te']


@settings(max_examples=300, deadline=None)
@given(value=st.dictionaries(st.text("ab\"\\\n", max_size=3), JSON, max_size=3), indent=st.sampled_from([None, 1]),
       at=st.integers(1, 100), bad=st.sampled_from(list('{}[]",:\\x1 \n\x01tnf-')))  # fmt: skip
def test_the_scanner_agrees_with_the_json_module(value, indent, at, bad):
    text = json.dumps(value, indent=indent)
    scanner = JsonScanner()
    assert scanner.feed(text + "rest") == len(text) == scanner.length and scanner.done
    for mark in scanner.marks:
        if mark.kind != "value":
            json.loads(text[mark.start : mark.end])
    changed = text[:at] + bad + text[at:]
    scanner = JsonScanner()
    used = scanner.feed(changed)
    try:
        found, end = json.JSONDecoder().raw_decode(changed)
    except ValueError:
        assert not scanner.done
    else:
        assert (scanner.done and used == end) == isinstance(found, dict)


def test_the_scanner_bounds_depth():
    for depth in (MAX_DEPTH, MAX_DEPTH + 1):
        scanner = JsonScanner()
        scanner.feed('{"a":' * depth + "1" + "}" * depth)
        assert scanner.done == (depth == MAX_DEPTH)
