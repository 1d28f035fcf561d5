"""The forms in which model families write calls, and which of them a model was taught."""

from __future__ import annotations

import random
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from deployments.tools import hermes, llama3, mistral, pythonic
from deployments.tools.base import BaseParser
from deployments.tools.either import CallsParser, EitherParser
from deployments.tools.grammar import Form
from deployments.tools.pieces import Parser
from model_core.tokenizer.tokenizer import Tokenizer

ToolParser = Literal["auto", "hermes", "llama3", "mistral", "pythonic"]


def _long_id() -> str:
    return "call_" + uuid.uuid4().hex[:24]


def _short_id() -> str:
    """Mistral's templates take ids of nine letters and digits only."""
    return "".join(random.choices(string.ascii_letters + string.digits, k=9))


@dataclass(frozen=True)
class Family:
    """tags: texts around calls, control tokens in some tokenizers: they must reach the parser, and no client."""

    name: str
    tags: tuple[str, ...]
    make: Callable[[frozenset[str], frozenset[str], Callable[[], str]], BaseParser]
    form: Form
    new_id: Callable[[], str] = _long_id

    def parser(
        self, names: frozenset[str], hidden: frozenset[str] = frozenset(), *, guided: bool = False, alone: bool = False,
        either: bool = False,
    ) -> Parser:  # fmt: skip
        """names: functions that may be called; hidden: those of `tags` that are control tokens. guided: a grammar makes
        calls have the family's form; alone: and be the whole answer; either: or that is one of another form."""
        parser = self.make(names, hidden, self.new_id)
        if guided:
            parser.expect_form()
        if either:
            return EitherParser(self.form.beginnings(sorted(names)), parser)
        return CallsParser(parser) if alone else parser


FAMILIES = {
    family.name: family
    for family in (
        Family("hermes", hermes.TAGS, hermes.HermesParser, hermes.FORM),
        Family("llama3", llama3.TAGS, llama3.LlamaParser, llama3.FORM),
        Family("mistral", mistral.TAGS, mistral.MistralParser, mistral.FORM, _short_id),
        Family("pythonic", pythonic.TAGS, pythonic.PythonicParser, pythonic.FORM),
    )
}
_SIGNS = {  # what only a template of that family says
    "mistral": ("[TOOL_CALLS]",),
    "hermes": ("<tool_call>",),
    "pythonic": ("func_name1(",),
    "llama3": ("<|python_tag|>", '"parameters": dictionary'),
}


def choose(setting: ToolParser, tokenizer: Tokenizer) -> Family:
    """auto: by what the model's chat templates say; Hermes' form, which can be taught in a prompt, if they say nothing."""
    family = FAMILIES[_read_off(tokenizer) if setting == "auto" else setting]
    if family.name == "mistral" and any(tokenizer.token_text(i) == mistral.ARGS for i in tokenizer.special_ids):
        return replace(family, form=mistral.NEWER)
    return family


def _read_off(tokenizer: Tokenizer) -> str:
    text = "".join(tokenizer.chat_templates)
    for name, signs in _SIGNS.items():
        if any(sign in text for sign in signs):
            return name
    return "hermes"
