"""Client libraries of other people, against the API over a fake engine. Not in the `dev` group, as their pins disagree with it:

uv run --no-default-groups --group clients pytest tests/clients
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.api.conftest import ROOMY, Server, make_tokenizer

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network at import

MODEL = "acme/tiny"
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


class Served:
    """The server, and what its model says."""

    CALL = CALL
    model = MODEL

    def __init__(self, server: Server) -> None:
        self.server = server
        self.url = server.url
        self.base_url = server.url + "/v1"
        server.limits.max_body_bytes = 1 << 20
        self.says("Hello world!")

    def says(self, *answers: str) -> None:
        """One answer after the other, the last for ever."""
        left = list(answers)

        def script(request):
            text = left.pop(0) if len(left) > 1 else left[0]
            return [*self.server.encode(text), self.server.IM_END]

        self.server.fake.script = script

    @property
    def params(self):
        """SamplingParams of the last request."""
        return self.server.fake.requests[-1].params

    @property
    def prompt(self) -> str:
        return bytes(i for i in self.server.fake.requests[-1].prompt_ids if i < 256).decode("utf-8", "replace")


@pytest.fixture(scope="session")
def _served() -> Iterator[Server]:
    server = Server(make_tokenizer(), info=ROOMY)
    yield server
    server.stop()


@pytest.fixture
def served(_served: Server) -> Iterator[Served]:
    _served.reset()
    yield Served(_served)
    _served.wait_idle()
