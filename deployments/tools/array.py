"""A JSON array of calls and nothing else: what a grammar makes a model write if it cannot make it write its family's tags."""

from __future__ import annotations

from deployments.tools.hermes import HermesParser


class ArrayParser(HermesParser):
    """As Hermes' form without its tags."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._state = "tag"
