"""The fields that say what an answer must look like: response_format, structured_outputs, text.format, output_config.format →
one GrammarSpec."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import orjson
from pydantic import BeforeValidator, ConfigDict, Field, StrictBool, StrictStr, WithJsonSchema
from pydantic_core import PydanticCustomError

from deployments.protocol.errors import ApiError, bad_request, unsupported
from deployments.protocol.validation import expected
from deployments.protocol.values import Effort, Nested
from model_core.errors import RequestError
from model_core.grammar.spec import GrammarSpec, of_choice, of_ebnf, of_json_object, of_regex, of_schema

Kind = Literal["text", "json_object", "json_schema"]
Name = Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class SchemaFormat(Nested):
    """strict changes nothing: every schema is held to the letter, or refused."""

    model_config = ConfigDict(extra="ignore")

    name: Name
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: StrictStr | None = None
    strict: StrictBool | None = None


class ResponseFormat(Nested):
    """Of chat and text completions. json_schema without a schema is any object; json_object may have one, as in llama.cpp."""

    model_config = ConfigDict(extra="ignore")

    type: Kind
    json_schema: SchemaFormat | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")

    def grammar(self, path: str) -> GrammarSpec | None:
        if self.type == "json_schema" and self.json_schema is None:
            raise _missing(f"{path}.json_schema")
        if self.type == "json_object" and self.schema_ is not None:
            return _json("json_schema", self.schema_, f"{path}.schema", path)
        return _json(self.type, self.json_schema and self.json_schema.schema_, f"{path}.json_schema.schema", path)


class OutputFormat(Nested):
    """Of /v1/responses: the same, less deep."""

    model_config = ConfigDict(extra="ignore")

    type: Kind
    name: Name | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: StrictStr | None = None
    strict: StrictBool | None = None

    def grammar(self, path: str) -> GrammarSpec | None:
        for name, value in (("name", self.name), ("schema", self.schema_)):
            if self.type == "json_schema" and value is None:
                raise _missing(f"{path}.{name}")
        return _json(self.type, self.schema_, f"{path}.schema", path)

    def said(self) -> dict[str, Any]:
        """As the answer repeats it."""
        if self.type != "json_schema":
            return {"type": self.type}
        return {"type": self.type, "name": self.name, "schema": self.schema_, "description": self.description,
                "strict": bool(self.strict)}  # fmt: skip


class TextOptions(Nested):
    model_config = ConfigDict(extra="ignore")

    format: OutputFormat | None = None
    verbosity: Any = None  # no effect on models without it


class MessageFormat(Nested):
    """Of /v1/messages."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")

    def grammar(self, path: str) -> GrammarSpec | None:
        return _json(self.type, self.schema_, f"{path}.schema", path)


class OutputConfig(Nested):
    """Of /v1/messages. Other members ask for what this server cannot do."""

    model_config = ConfigDict(extra="allow")

    format: MessageFormat | None = None
    effort: Effort | None = None  # of thinking

    def check(self, path: str) -> None:
        """Raises ApiError 400."""
        reasons = {"task_budget": "Its models see no budget: use max_tokens."}
        for name in self.model_extra or ():
            words = f"Unsupported parameter: '{path}.{name}' is not supported by this server."
            raise unsupported(f"{path}.{name}", f"{words} {reasons.get(name, 'Only format and effort are.')}")


def _schema(value: Any) -> Any:
    """A JSON schema, which may also come as text."""
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise PydanticCustomError("json_text", "Expected the text of a JSON schema: {why}", {"why": str(error)}) from None
    if not isinstance(value, (dict, bool)):
        raise expected("a JSON schema, or its text", value)
    return value


_SCHEMA_OR_TEXT = {"anyOf": [{"type": "object"}, {"type": "string"}, {"type": "boolean"}]}


class StructuredOutputs(Nested):
    """vLLM's field: exactly one of these, or none."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"additionalProperties": False})  # others are refused in words

    json_: Annotated[Any, BeforeValidator(_schema), Field(alias="json"), WithJsonSchema(_SCHEMA_OR_TEXT)] = None
    json_object: StrictBool | None = None
    regex: StrictStr | None = None
    choice: Annotated[list[StrictStr], Field(min_length=1, max_length=1024)] | None = None
    grammar_: StrictStr | None = Field(None, alias="grammar")

    def grammar(self, path: str) -> GrammarSpec | None:
        for name in self.model_extra or ():
            raise unsupported(f"{path}.{name}", f"Unsupported parameter: '{path}.{name}' is not supported by this server. "
                                                "Use one of json, json_object, regex, choice and grammar.")  # fmt: skip
        wishes: dict[str, Any] = {"json": self.json_, "json_object": self.json_object or None, "regex": self.regex,
                                  "choice": self.choice, "grammar": self.grammar_}  # fmt: skip
        asked = [name for name, value in wishes.items() if value is not None]
        if len(asked) > 1:
            raise bad_request(f"'{path}' may hold only one of {', '.join(wishes)}, but got {' and '.join(asked)}.", param=path)
        if not asked:
            return None
        make: Any = {"json": of_schema, "json_object": lambda _, param: of_json_object(param), "regex": of_regex,
                     "choice": of_choice, "grammar": of_ebnf}[asked[0]]  # fmt: skip
        return _made(make, wishes[asked[0]], f"{path}.{asked[0]}")


def one_grammar(**fields: Any) -> GrammarSpec | None:
    """The grammar that a request's fields ask for, each of them None or one of the models above. Raises ApiError 400."""
    found = {path: spec for path, field in fields.items() if field is not None and (spec := field.grammar(path))}
    if len(found) > 1:
        raise bad_request(f"Send either {' or '.join(repr(path) for path in found)}, not both.", param=next(iter(found)))
    return next(iter(found.values()), None)


def _json(kind: Kind, schema: Any, schema_path: str, path: str) -> GrammarSpec | None:
    if kind == "text":
        return None
    if kind == "json_object" or schema is None:
        return of_json_object(path)
    return _made(of_schema, schema, schema_path)


def _made(make: Any, value: Any, path: str) -> GrammarSpec:
    try:
        spec: GrammarSpec = make(value, path)
    except RequestError as error:
        raise bad_request(str(error), param=error.param, code=error.code or "invalid_value") from None
    return spec


def _missing(path: str) -> ApiError:
    return bad_request(f"Missing required parameter: '{path}'.", param=path, code="missing_required_parameter")
