"""Chat templates: jinja2 in its sandbox, with the names and filters that Hugging Face templates rely on.

Conventions (block trimming, helpers, `tojson` without escapes, {% generation %}) as documented for transformers'
apply_chat_template. Templates come from checkpoints, not from users; still, time and size of a rendering are bounded.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from model_core.errors import RequestError
from model_core.tokenizer.split import Splitter

MAX_RENDERED_CHARS = 16_777_216
MAX_RENDER_SECONDS = 10.0
_ESCAPE = re.compile(r"\\u([0-9a-f]{4})")
_OURS = frozenset({"messages", "add_generation_prompt", "_tick", "_join"})


class ChatTemplate:
    """The template(s) of one checkpoint. `templates` maps names to sources: "default", and perhaps "tool_use".

    variables: bos_token, eos_token and the like, as the tokenizer's configuration names them.
    """

    def __init__(self, templates: dict[str, str], variables: dict[str, str] | None = None) -> None:
        if not templates:
            raise ValueError("a ChatTemplate needs at least one template")
        self._templates = templates
        self._variables = variables or {}
        self._compiled: dict[str, Template] = {}

    @property
    def source(self) -> str | None:
        return self._templates.get("default")

    @property
    def sources(self) -> list[str]:
        return list(self._templates.values())

    @cached_property
    def takes_tools(self) -> bool:
        """Whether the template that is rendered if there are tools looks at them."""
        source = self._templates.get("tool_use", self._templates.get("default", ""))
        try:
            return "tools" in find_undeclared_variables(self._environment.parse(source))
        except TemplateError:
            return False

    @cached_property
    def _environment(self) -> ImmutableSandboxedEnvironment:
        return _Environment()

    def render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool, **kwargs: Any) -> str:
        """Raises RequestError: the template refused the messages, failed, or exceeded the limits of this module."""
        clash = _OURS & kwargs.keys()
        if clash:
            raise RequestError(f"{min(clash)!r} cannot be given as a template argument", param="chat_template_kwargs")
        deadline = time.monotonic() + MAX_RENDER_SECONDS

        def tick() -> None:
            if time.monotonic() > deadline:
                raise TemplateError(f"it took more than {MAX_RENDER_SECONDS:g} seconds")

        values = {"tools": None, "documents": None, **self._variables, **kwargs, "messages": messages, "_tick": tick}
        try:
            pieces: list[str] = []
            size = 0
            name = "tool_use" if kwargs.get("tools") and "tool_use" in self._templates else "default"
            for piece in self._template(name).generate(add_generation_prompt=add_generation_prompt, **values):
                size += len(piece)
                if size > MAX_RENDERED_CHARS:
                    raise TemplateError(f"the prompt exceeds {MAX_RENDERED_CHARS} characters")
                pieces.append(piece)
            return "".join(pieces)
        except RequestError:
            raise
        except Exception as error:  # a template may raise anything: KeyError, TypeError, RecursionError, SecurityError
            detail = str(error) or type(error).__name__
            raise RequestError(f"the model's chat template failed: {detail[:500]}", param="messages",
                               code="chat_template_error") from error

    def _template(self, name: str) -> Template:
        found = self._compiled.get(name)
        if found is None:
            if name not in self._templates:
                raise RequestError(f"the model has chat templates {sorted(self._templates)} but no {name!r} one; write "
                                   "the prompt yourself and send it to /v1/completions", param="messages",
                                   code="chat_template_missing")
            found = self._compiled[name] = self._environment.from_string(self._templates[name])
        return found


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks assistant text for training; for us it is its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Joins(NodeTransformer):
    """a ~ b as a call of _join: the one operator that the sandbox cannot intercept."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return nodes.Call(nodes.Name("_join", "load"), node.nodes, [], None, None, lineno=node.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _to_json
        self.globals["_join"] = _join
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        # Every loop round and macro call looks at the clock: neither can run away without writing anything.
        tree = _Joins().visit(super()._parse(source, name, filename))
        for node in tree.find_all((nodes.For, nodes.Macro)):
            assert isinstance(node, (nodes.For, nodes.Macro))
            node.body.insert(0, nodes.ExprStmt(nodes.Call(nodes.Name("_tick", "load"), [], [], None, None)))
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        # What one expression can blow up: 'x' * 10**9, 9**9**9, s + s in a loop. 0.2 us per operation.
        if operator == "**":
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > 4096:
                raise TemplateError("a power exceeds 4096 bits")
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(value, (str, bytes, list, tuple)):
                    _check_size(len(value) * times)
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > 4096:
                raise TemplateError("a product exceeds 4096 bits")
        elif isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
            _check_size(len(left) + len(right))
        return super().call_binop(context, operator, left, right)


def _check_size(size: int) -> None:
    if size > MAX_RENDERED_CHARS:
        raise TemplateError(f"a value exceeds {MAX_RENDERED_CHARS} characters or items")


def _join(*parts: Any) -> str:
    texts = [str(part) for part in parts]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


# Telling apart what the template wrote from what a user wrote: wherever a user's string holds a control token, or could
# begin one that other text completes, a private-use character is put inside. What still matches a control token after
# rendering is the template's own; the character is then taken out of the plain text. Inside, not around it, so that
# filters such as `content | trim` keep working.


def strings_of(value: Any) -> Iterator[str]:
    """Every string in nested lists and dicts, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings_of(key)
            yield from strings_of(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings_of(item)


def pick_marker(strings: list[str]) -> str:
    """A private-use character (U+E000 to U+F8FF, then plane 15) that none of `strings` holds, nor its escape."""
    used = set().union(*strings) | {chr(int(code, 16)) for string in strings for code in _ESCAPE.findall(string)}
    for code in (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE)):
        if chr(code) not in used:
            return chr(code)
    raise RequestError("the messages use every private-use character of Unicode", param="messages")


def unmark(text: str, marker: str) -> str:
    """`text` without `marker`, and without it as printed lists and tojson(ensure_ascii=true) write it."""
    for form in (marker, repr(marker)[1:-1], json.dumps(marker)[1:-1]):
        text = text.replace(form, "")
    return text


def mark(value: Any, splitter: Splitter, marker: str) -> Any:
    """`value` with `marker` inside every control token's text in it, so that none is left."""
    if isinstance(value, str):
        return _mark_text(value, splitter, marker)
    if isinstance(value, dict):
        return {mark(key, splitter, marker): mark(item, splitter, marker) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [mark(item, splitter, marker) for item in value]
    return value


def _mark_text(text: str, splitter: Splitter, marker: str) -> str:
    cuts = [start + 1 for start in splitter.starts(text)]
    if splitter.ends_inside(text):
        cuts.append(len(text.rstrip()))  # before white space that the template may strip
    bounds = [0, *sorted(cuts), len(text)]
    return marker.join(text[a:b] for a, b in zip(bounds, bounds[1:], strict=False))
