"""Answers about the server itself: its model, its tokens, its state."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import TypedDict


class ModelMeta(TypedDict):
    family: str
    source: str
    n_params: int
    dtype: str
    device: str
    vocab_size: int
    pool_tokens: int
    max_seqs: int


class ModelCard(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int
    meta: ModelMeta


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelCard]


class Tokens(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(TypedDict):
    prompt: str


class TokenizerInfo(TypedDict):
    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    chat_template: str | None


class Capability(TypedDict):
    name: str
    status: Literal["supported", "ignored", "refused"]
    note: str


class Capabilities(TypedDict):
    object: Literal["capabilities"]
    endpoints: dict[str, list[Capability]]


class State(TypedDict):
    status: Literal["ok", "ready", "loading", "draining"]


class Version(TypedDict):
    version: str


class Load(TypedDict):
    server_load: int


class DispatchTable(TypedDict):
    object: Literal["list"]
    data: list[dict[str, Any]]


class Index(TypedDict):
    """What there is."""

    name: str
    version: str
    generate: list[str]
    models: list[str]
    tokens: list[str]
    describe: list[str]
    operate: list[str]
