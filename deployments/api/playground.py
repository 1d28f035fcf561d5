"""The page at / for browsers: a chat with the model, in one file, without scripts, fonts or anything else from elsewhere."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse

_PAGE = Path(__file__).with_suffix(".html").read_text("utf-8")
_HEADERS = {
    # what a model writes is put there as text; were it ever taken for HTML, it could load and send nothing
    "content-security-policy": "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'",
    "vary": "accept",
}


def is_wanted(request: Request) -> bool:
    """By browsers, which ask for HTML; programs get JSON."""
    return "text/html" in request.headers.get("accept", "")


def playground() -> HTMLResponse:
    return HTMLResponse(_PAGE, headers=_HEADERS)
