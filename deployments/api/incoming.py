"""The body of a request, read only by a server that has room for what it may ask."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request

from deployments.api.service import Service
from deployments.protocol.body import read_json


async def read_body(service: Service, request: Request) -> dict[str, Any]:
    """Admission comes first: an overloaded server must not spend its time on parsing and tokenising. Raises ApiError."""
    await service.gate.check(1)
    headers = dict(request.scope["headers"])
    body = await read_json(headers, request.receive, service.limits.max_body_bytes)
    request.scope["mini_llm.record"].received_at = time.perf_counter()
    return body
