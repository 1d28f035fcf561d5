"""One request as a client sends it, and what may answer it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from benchmarks import forms

TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}}]  # fmt: skip


@dataclass(frozen=True)
class Ask:
    """One request. body: as sent; fields: what it asks for, if it is a good one. statuses: those that may answer it.

    manner: read (all of the answer), slow (all, in sips), leave (close after some bytes) or reset (the same by a TCP reset);
    patience: how many bytes until a client leaves, below 0: it does so with so many bytes of the request unsent. key: of the
    API; form: of the answer.
    """

    kind: str
    path: str
    body: bytes
    statuses: tuple[int, ...] = (200,)
    fields: dict[str, Any] = field(default_factory=dict)
    method: str = "POST"
    content_type: str = "application/json"
    manner: str = "read"
    patience: int = 0
    headers: tuple[tuple[str, str], ...] = ()
    key: str | None = None
    form: forms.Form | None = None

    @classmethod
    def of(cls, kind: str, path: str, fields: dict[str, Any], statuses: tuple[int, ...] = (200,)) -> Ask:
        """For JSON with these fields."""
        return cls(kind, path, json.dumps(fields).encode(), statuses, fields)

    @property
    def good(self) -> bool:
        return self.statuses == (200,)

    @property
    def sequences(self) -> int:
        prompts = self.fields.get("prompt")
        batch = len(prompts) if isinstance(prompts, list) and not isinstance(prompts[0], int) else 1
        return batch * self.fields.get("n", 1)

    def head(self) -> bytes:
        lines = [f"{self.method} {self.path} HTTP/1.1", "host: 127.0.0.1", "connection: close"]
        if self.body:
            lines += [f"content-type: {self.content_type}", f"content-length: {len(self.body)}"]
        if self.key is not None:
            lines.append(f"authorization: Bearer {self.key}")
        lines += [f"{name}: {value}" for name, value in self.headers]
        return "\r\n".join(lines).encode() + b"\r\n\r\n"
