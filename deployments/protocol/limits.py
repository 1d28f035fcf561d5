"""The limits of the HTTP API: the `limits` section of serve_config.yaml."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Limits(BaseModel):
    """What one request may ask for and how long it may take. `null` switches a deadline off."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_body_bytes: int = Field(default=4 << 20, ge=1024, description="Largest request body in bytes; beyond it: 413.")
    max_queued_requests: int = Field(
        default=256, ge=0, description="Sequences that may wait beyond those the engines run at once; beyond it: 503."
    )
    queue_timeout_s: float | None = Field(
        default=120.0, gt=0, description="Seconds a request may wait for its first token; then 503 engine_overloaded."
    )
    request_timeout_s: float | None = Field(
        default=1800.0, gt=0, description="Seconds a request may take in all; then 408, 504 or an error event."
    )
    idle_timeout_s: float | None = Field(
        default=300.0, gt=0, description="Seconds between two tokens of a request; then 504 or an error event."
    )
    reader_timeout_s: float | None = Field(
        default=60.0, gt=0, description="Seconds a client may leave its answer unread; then the connection is cut."
    )
    max_stop_strings: int = Field(default=4, ge=0, description="Longest `stop` array; some editors send more than 4.")
    max_n: int = Field(default=8, ge=1, le=128, description="Largest `n`.")
    max_logprobs: int = Field(
        default=20, ge=0, le=100, description="Largest `top_logprobs` (chat), `logprobs` (text) and `prompt_logprobs`."
    )
    heartbeat_s: float = Field(
        default=15.0, ge=0, description="Seconds without an event after which a stream gets a comment line; 0: never."
    )
