"""The one error envelope of this server: {"error": {message, type, param, code}}, all four keys always present.

Shape and codes follow OpenAI's published document (all four required, `code` a string or null); status codes follow
what its official client retries (408, 409, 429 and 5xx, unless `x-should-retry` says otherwise).
"""

from __future__ import annotations

import re

import orjson

GOOD_ID = re.compile(rb"[\x21-\x7e]{1,128}")  # an x-request-id that is sent back, and stands in logs and errors


class ApiError(Exception):
    """An answer other than success. `headers` are sent with it (lower-case names)."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> bytes:
        """The envelope as JSON bytes."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return orjson.dumps({"error": error})


def bad_request(message: str, *, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="unsupported_parameter")


def model_not_found(model: str, served: list[str]) -> ApiError:
    names = ", ".join(f"'{name}'" for name in served)
    return ApiError(
        404, f"The model '{model}' does not exist. Served here: {names}.", param="model", code="model_not_found"
    )


def unknown_url(message: str) -> ApiError:
    return ApiError(404, message, code="unknown_url")


def context_too_long(limit: int, tokens: int, *, noun: str, at_least: bool = False) -> ApiError:
    """LiteLLM and others recognise this case by the first sentence: keep its words."""
    about = "at least " if at_least else ""
    return ApiError(
        400,
        f"This model's maximum context length is {limit} tokens. However, your {noun} resulted in {about}{tokens} "
        f"tokens, which leaves no room for an answer. Please reduce the length of the {noun}.",
        param=noun,
        code="context_length_exceeded",
    )


def no_key() -> ApiError:
    """The same for no key and a wrong one: a guesser learns nothing."""
    return ApiError(
        401,
        "No valid API key provided. Send 'authorization: Bearer KEY' or 'x-api-key: KEY'.",
        code="invalid_api_key",
        headers={"www-authenticate": "Bearer"},
    )


def not_allowed(param: str, message: str) -> ApiError:
    """What other keys may do."""
    return ApiError(403, message, type="permission_error", param=param, code="insufficient_permissions")


def rate_limited(message: str, retry_after_s: int) -> ApiError:
    headers = {"retry-after": str(retry_after_s)}
    return ApiError(429, message, type="rate_limit_error", code="rate_limit_exceeded", headers=headers)


def overloaded(message: str, retry_after_s: int) -> ApiError:
    return unavailable(message, "engine_overloaded", retry_after_s)


def draining(retry_after_s: int = 5) -> ApiError:
    return unavailable("The server is shutting down and takes no new requests.", "draining", retry_after_s)


def shut_down() -> ApiError:
    """Of a request that was running."""
    return unavailable("The server is shutting down and has ended this request.", "draining", 5)


def loading(retry_after_s: int = 2) -> ApiError:
    return unavailable("The model is loading; try again shortly.", "model_loading", retry_after_s)


def replica_lost(started: bool) -> ApiError:
    """`started`: some tokens were made, so a blind retry would be a second generation."""
    headers = {"x-should-retry": "false"} if started else {"retry-after": "2"}
    message = "The model replica that served this request stopped." + ("" if started else " Please try again.")
    return ApiError(503, message, type="service_unavailable", code="replica_lost", headers=headers)


def timed_out(deadline: str, started: bool) -> ApiError:
    """The request's total deadline, in words. 408 before the first token, 504 after it; the client must not repeat either."""
    return ApiError(
        504 if started else 408,
        f"The request passed {deadline}. Ask for fewer tokens.",
        type="timeout",
        code="deadline_exceeded" if started else "request_timeout",
        headers={"x-should-retry": "false"},
    )


def idle_too_long(limit_s: float) -> ApiError:
    """The engine gave the sequence no token for so long, after the first one."""
    return ApiError(
        504,
        f"No token came for {limit_s:g} s (idle_timeout_s).",
        type="timeout",
        code="deadline_exceeded",
        headers={"x-should-retry": "false"},
    )


def internal_error() -> ApiError:
    """A bug or an engine fault: the text is fixed, details go to the log only."""
    return ApiError(500, "The server had an error while processing your request.", type="server_error")


def unavailable(message: str, code: str, retry_after_s: int) -> ApiError:
    headers = {"retry-after": str(retry_after_s)}
    return ApiError(503, message, type="service_unavailable", code=code, headers=headers)
