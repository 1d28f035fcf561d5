"""Who may use the HTTP API: the `access` section of serve_config.yaml, and the file of keys that it may name."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

from model_core.errors import ConfigError

_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/?#\s]+")  # as browsers send it
_DIGEST = re.compile(r"[0-9a-f]{64}")


class ApiKey(BaseModel):
    """One key: exactly one of `key`, `sha256` and `env`, and what its holder may do. Limits count per HTTP replica."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=64, description="Whose key it is; for the access log.")
    key: SecretStr | None = Field(default=None, description="The key itself. Ray's dashboard shows it: better one of the next.")
    sha256: str | None = Field(default=None, description="Its SHA-256 in hexadecimal.")
    env: str | None = Field(default=None, description="Name of the environment variable that holds it.")
    requests_per_minute: int | None = Field(default=None, ge=1, description="POST requests in a minute; beyond: 429.")
    tokens_per_minute: int | None = Field(
        default=None, ge=1, description="Tokens of prompts and answers in a minute; once they are used: 429."
    )
    concurrent_requests: int | None = Field(default=None, ge=1, description="POST requests at a time; beyond: 429.")

    min_priority: int | None = Field(
        default=None, ge=-1000, le=1000, description="Smallest `priority` of its requests, smaller ones go first; below: 403."
    )

    @model_validator(mode="after")
    def _check(self) -> ApiKey:
        if sum(value is not None for value in (self.key, self.sha256, self.env)) != 1:
            raise ValueError(f"key {self.name!r} must have exactly one of key, sha256 and env")
        if self.sha256 is not None and not _DIGEST.fullmatch(self.sha256):
            raise ValueError(f"sha256 of key {self.name!r} must be 64 lower-case hexadecimal digits")
        if self.key is not None and not self.key.get_secret_value():
            raise ValueError(f"key {self.name!r} is empty")
        return self

    def digest(self) -> bytes:
        """32 bytes. Raises ConfigError if the environment variable is not set."""
        if self.sha256 is not None:
            return bytes.fromhex(self.sha256)
        secret = self.key.get_secret_value() if self.key is not None else os.environ.get(self.env or "", "")
        if not secret:
            raise ConfigError(f"access.keys: the environment variable {self.env} of key {self.name!r} is not set; "
                              "set it where Serve is started")  # fmt: skip
        return hashlib.sha256(secret.encode()).digest()


class Access(BaseModel):
    """Without keys everybody who reaches the port may use the API."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: list[ApiKey] = Field(
        default_factory=list,
        description="API keys: name, one of sha256, env (a variable's name) and key, and optional requests_per_minute, "
        "tokens_per_minute and concurrent_requests (counted by each HTTP replica, see api_replicas) and min_priority. Any key "
        "closes everything but /, /health, /ready, /version, /docs, /openapi.json.",
    )
    keys_file: str | None = Field(
        default=None, min_length=1, description="YAML file with more of such keys; read again when it changes."
    )
    open_metrics: bool = Field(default=True, description="Whether /metrics needs no key.")
    cors_origins: list[str] = Field(
        default_factory=list, description="Origins whose web pages may call the API, or ['*']; none: browsers refuse it."
    )

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, values: list[str]) -> list[str]:
        for value in values:
            if not _ORIGIN.fullmatch(value):
                raise ValueError(f"{value!r} is no origin: write '*', or scheme, host and port as in 'https://a.example:8443'")
        return values

    @property
    def needs_key(self) -> bool:
        return bool(self.keys) or self.keys_file is not None

    @property
    def counts(self) -> bool:
        """Whether a key may have limits, which each HTTP replica counts by itself."""
        limits = ("requests_per_minute", "tokens_per_minute", "concurrent_requests")
        return self.keys_file is not None or any(getattr(key, name) is not None for key in self.keys for name in limits)

    def settled(self, folder: Path) -> Access:
        """As the HTTP replicas need it: digests in place of keys and variables, keys_file (relative to `folder`)
        absolute and readable. Raises ConfigError."""
        keys = [
            key.model_copy(update={"key": None, "env": None, "sha256": key.digest().hex()}) for key in self.keys
        ]
        path = None if self.keys_file is None else str((folder / Path(self.keys_file).expanduser()).absolute())
        by_digest([*keys, *([] if path is None else read_keys(Path(path)))])
        return self.model_copy(update={"keys": keys, "keys_file": path})


def by_digest(keys: Iterable[ApiKey]) -> dict[bytes, ApiKey]:
    """Raises ConfigError if one is there twice: which limits would be those of its holder?"""
    found: dict[bytes, ApiKey] = {}
    for key in keys:
        other = found.setdefault(key.digest(), key)
        if other is not key:
            raise ConfigError(f"access: {other.name!r} and {key.name!r} are the same key; list it once")
    return found


def read_keys(path: Path) -> list[ApiKey]:
    """The keys of a keys_file: a YAML list of what access.keys lists. Raises ConfigError, which never shows a key."""
    try:
        content: Any = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"access.keys_file {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ConfigError(f"access.keys_file {path} is not YAML") from None
    if not isinstance(content, list) or not content or not all(isinstance(item, Mapping) for item in content):
        raise ConfigError(f"access.keys_file {path} must be a list of keys, like access.keys")
    keys = []
    for index, item in enumerate(content):
        try:
            keys.append(ApiKey.model_validate(item))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            text = first["msg"].removeprefix("Value error, ")
            raise ConfigError(f"access.keys_file {path}: entry {index}: {where and where + ': '}{text}") from None
    return keys
