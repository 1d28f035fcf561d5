"""Whether this environment can send OpenTelemetry spans. Apart from api/tracing.py, so that settings need no web server."""

from __future__ import annotations

import importlib.util

EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"


def missing_exporter() -> str | None:
    """What to install for spans to be sent, None if it is there."""
    try:
        found = importlib.util.find_spec(EXPORTER)
    except ModuleNotFoundError:
        found = None
    return None if found else "pip install opentelemetry-exporter-otlp-proto-http (or this project with its extra `otel`)"
