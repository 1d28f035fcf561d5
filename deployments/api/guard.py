"""The layers between the edge and the routes: API keys, and CORS for browsers."""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.api.edge import refuse
from deployments.api.keys import Bucket, KeyRing
from deployments.api.record import Record
from deployments.protocol.errors import ApiError, bad_request, no_key

# What probes, load balancers and people need before they have a key; none of it tells about the model or costs work.
OPEN_PATHS = frozenset({"/", "/health", "/ready", "/version", "/docs", "/openapi.json"})
_EXPOSED = ("x-request-id", "request-id", "retry-after", "x-should-retry",
            *(f"x-ratelimit-{what}-{unit}" for what in ("limit", "remaining", "reset") for unit in ("requests", "tokens")))


class Guard:
    """ASGI middleware inside Edge: a key for every route but the open ones, and its limits for every POST."""

    def __init__(self, app: ASGIApp, *, keys: KeyRing, open_paths: frozenset[str]) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["mini_llm.record"].route in self._open_paths:
            await self._app(scope, receive, send)
            return
        holder = self._keys.find(_key_of(scope))
        if holder is None:
            await refuse(no_key(), scope, receive, send)
            return
        record = scope["mini_llm.record"]
        record.key, record.min_priority = holder.key.name, holder.key.min_priority
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        charge = Charge(holder.tokens, record, self._keys.clock)

        async def send_with_allowance(message: Message) -> None:
            if message["type"] == "http.response.start":
                charge.now()
                buckets = (bucket for bucket in (holder.requests, holder.tokens) if bucket is not None)
                message["headers"] = [*message.get("headers", ()), *(pair for bucket in buckets for pair in bucket.headers())]
            await send(message)

        try:
            with holder.hold(self._keys.clock()):
                await self._app(scope, receive, send_with_allowance)
        except ApiError as error:  # only hold() raises one here: those of the routes have become answers
            await refuse(error, scope, receive, send_with_allowance)
        finally:
            charge.now()


class Charge:
    """What one request uses of its key's tokens: those that its record has when `now` is called, each once."""

    def __init__(self, tokens: Bucket | None, record: Record, clock: Callable[[], float]) -> None:
        self._tokens = tokens
        self._record = record
        self._clock = clock
        self._charged = 0

    def now(self) -> None:
        if self._tokens is not None:
            used = (self._record.prompt_tokens or 0) + (self._record.completion_tokens or 0)
            self._tokens.spend(used - self._charged, self._clock())
            self._charged = used


def _key_of(scope: Scope) -> bytes:
    """`authorization: Bearer KEY` (OpenAI) or `x-api-key: KEY` (Anthropic); empty if there is neither."""
    own = b""
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            if scheme.lower() == b"bearer":
                return key.strip()
        elif name == b"x-api-key":
            own = value.strip()
    return own


class Cors(CORSMiddleware):
    """Starlette's, whose refusals are bare text."""

    def __init__(self, app: ASGIApp, origins: list[str]) -> None:
        super().__init__(
            app, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"], expose_headers=_EXPOSED
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        words = f"{bytes(response.body).decode()}. Methods are GET and POST, origins those of access.cors_origins."
        error = bad_request(f"CORS: {words}", code="cors_refused")
        kept = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
        return Response(error.body(), error.status, kept, "application/json")
