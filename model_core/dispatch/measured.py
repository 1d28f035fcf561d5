"""What calibration found for a bucket of rows: plain data, which a file holds and a person can read."""

from __future__ import annotations

import re
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import torch

from model_core.dispatch.tiles import PRODUCTS, Choice, StepTiles, candidates, default_tiles
from model_core.kernels.decode.products import RowTiles
from model_core.kernels.decode.registers import RegisterTiles
from model_core.kernels.decode.tiles import TensorTiles
from model_core.model.config import ModelConfig

_KINDS: dict[str, type] = {kind.__name__: kind for kind in (RowTiles, RegisterTiles, TensorTiles)}
_MOST_TRIED = {RegisterTiles: 5, TensorTiles: 3}  # the likeliest; rows and the library have few


@dataclass(frozen=True)
class Candidate:
    """microseconds of one call; None where it failed, and why."""

    choice: Choice
    microseconds: float | None
    problem: str = ""


@dataclass(frozen=True)
class Measured:
    """rows: those it was measured for. candidates: by product, the default first. reasons: by product, why `tiles` are what
    they are. step: microseconds of a whole step with the default tiles and with the fastest of each product, where they differ.
    """

    rows: int
    candidates: dict[str, tuple[Candidate, ...]]
    tiles: StepTiles
    reasons: dict[str, str]
    step: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For a file; `from_json` reads it back."""
        products = {}
        for op in PRODUCTS:
            times = [one.microseconds for one in self.candidates[op] if one.microseconds is not None]
            products[op] = {
                "choice": label(getattr(self.tiles, op)),
                "reason": self.reasons[op],
                "candidates": [_candidate_json(one, getattr(self.tiles, op), min(times, default=0.0))
                               for one in self.candidates[op]],
            }  # fmt: skip
        return {"rows": self.rows, "step_microseconds": self.step, "products": products}

    @classmethod
    def from_json(cls, data: dict[str, Any], config: ModelConfig, dtype: torch.dtype) -> Measured:
        """Raises ValueError, KeyError or TypeError if it is not what `to_json` wrote, or not for this model."""
        rows = int(data["rows"])
        found, chosen, reasons = {}, {}, {}
        for op in PRODUCTS:
            product = data["products"][op]
            found[op] = tuple(
                Candidate(parse(one["tiles"]), _microseconds(one["microseconds"]), str(one.get("failed", "")))
                for one in product["candidates"])  # fmt: skip
            chosen[op], reasons[op] = parse(product["choice"]), str(product["reason"])
            choices = [one.choice for one in found[op]]
            if choices != tried(config, op, rows, dtype) or chosen[op] not in choices:
                raise ValueError(f"{product['choice']} of {len(choices)} is no choice for {op}")
        step = {str(name): float(time) for name, time in data["step_microseconds"].items()}
        return cls(rows, found, with_products(default_tiles(config, rows, dtype), chosen), reasons, step)


def with_products(tiles: StepTiles, chosen: dict[str, Choice]) -> StepTiles:
    """`tiles` with other choices for the products; whatever else a step is made of stays."""
    return replace(tiles, **chosen)  # type: ignore[arg-type]


def _candidate_json(one: Candidate, chosen: Choice, fastest: float) -> dict[str, Any]:
    found: dict[str, Any] = {"tiles": label(one.choice), "microseconds": one.microseconds}
    if one.microseconds is None:
        found["failed"] = one.problem
    elif one.choice != chosen:
        slower = one.microseconds - fastest
        found["lost"] = f"{slower:.2f} us slower" if slower else "fastest alone, see the reason"
    return found


def _microseconds(value: Any) -> float | None:
    return None if value is None else float(value)


def label(choice: Choice) -> str:
    """RegisterTiles(16, 64, 8, 4), or library."""
    return choice if isinstance(choice, str) else f"{type(choice).__name__}({', '.join(map(str, astuple(choice)))})"


def parse(text: str) -> Choice:
    """The choice that has this label. Raises ValueError."""
    if text == "library":
        return "library"
    match = re.fullmatch(r"(\w+)\(((?:\d+)(?:, \d+)*)\)", text)
    if match is None or match[1] not in _KINDS:
        raise ValueError(f"{text!r} is no choice of tiles")
    try:
        return _KINDS[match[1]](*map(int, match[2].split(", ")))
    except TypeError as error:
        raise ValueError(f"{text!r}: {error}") from None


def tried(config: ModelConfig, op: str, rows: int, dtype: torch.dtype) -> list[Choice]:
    """The candidates that are measured: each once, the default first, of long families the likeliest (every one is a kernel
    to compile)."""
    left, found = dict(_MOST_TRIED), []
    for choice in dict.fromkeys(candidates(config, op, rows, dtype)):
        kind: Any = type(choice)
        if left.get(kind) == 0:
            continue
        if kind in left:
            left[kind] -= 1
        found.append(choice)
    return found


def choose(found: tuple[Candidate, ...], tie: float) -> Choice | None:
    """The fastest, or one before it in the list that is not more than the share `tie` slower; None if nothing ran."""
    times = [one.microseconds for one in found if one.microseconds is not None]
    near = [one.choice for one in found if one.microseconds is not None and one.microseconds <= min(times) * (1 + tie)]
    return near[0] if near else None


def reason(found: tuple[Candidate, ...], chosen: Choice) -> str:
    """Why `choose` chose that."""
    mine = next((one.microseconds for one in found if one.choice == chosen), None)
    others = [(one.microseconds, label(one.choice)) for one in found if one.microseconds is not None and one.choice != chosen]
    if mine is None:
        said = "default: nothing could be measured"
    elif not others:
        said = f"measured: {mine:.2f} us, alone"
    else:
        time, name = min(others)
        said = (f"measured: {mine:.2f} us, {time - mine:.2f} us faster than {name}" if time >= mine else
                f"measured: {mine:.2f} us, as fast as {name} ({time:.2f} us) within the noise")  # fmt: skip
    failed = [f"{label(one.choice)} failed: {one.problem}" for one in found if one.microseconds is None]
    return "; ".join([said, *failed])


def explain_row(op: str, low: int, high: int, tiles: StepTiles, measured: Measured | None, config: ModelConfig,
                dtype: torch.dtype) -> dict[str, Any]:  # fmt: skip
    """One product of steps of `low` to `high` rows, as a row of the dispatch table; JSON-serialisable."""
    choice = getattr(tiles, op)
    times: dict[str, float | None] = dict.fromkeys(map(label, tried(config, op, high, dtype)))
    why = "default, not measured"
    if measured is not None:
        times = {label(one.choice): one.microseconds for one in measured.candidates[op]}
        why = f"{measured.reasons[op]} (for {measured.rows} row{'s' * (measured.rows > 1)})"
    rule = "1 row" if low == high == 1 else f"{high} rows" if low == high else f"{low} to {high} rows"
    return {"op": f"decode {op}", "rule": rule, "candidates": {label(choice): None} | times, "choice": label(choice),
            "reason": why}  # fmt: skip
