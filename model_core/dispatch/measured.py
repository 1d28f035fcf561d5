"""What calibration found for a bucket of rows: plain data, which a file holds and a person can read."""

from __future__ import annotations

import re
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch

from model_core.dispatch.tiles import (
    NEAR,
    Choice,
    StepTiles,
    attention_candidates,
    candidates,
    far_candidates,
    shared_candidates,
)
from model_core.kernels.decode.attention import SplitTiles
from model_core.kernels.decode.partition import DRIVERS_CHOICE
from model_core.kernels.decode.products import RowTiles
from model_core.kernels.decode.registers import RegisterTiles
from model_core.kernels.decode.streaming import StreamTiles
from model_core.kernels.decode.tiles import TensorTiles
from model_core.model.config import ModelConfig

CHOICES = ("attention", "gate_up", "down", "qkv", "o", "head", "far", "shared")  # in the order in which they are measured
Setting = Choice | SplitTiles | int  # int: percent of shared memory

_KINDS: dict[str, type] = {kind.__name__: kind for kind in (RowTiles, RegisterTiles, StreamTiles, TensorTiles, SplitTiles)}
_MOST_TRIED = 4  # of a product's tiles, the likeliest: every one is a kernel to compile


@dataclass(frozen=True)
class Candidate:
    """microseconds of a whole step with it; None where that failed, and why."""

    choice: Setting
    microseconds: float | None
    problem: str = ""


@dataclass(frozen=True)
class Measured:
    """rows, layers: of the steps that were measured. candidates: by choice (CHOICES), the default first, each measured beside
    the best of the choices before it. reasons: by choice, why `tiles` are what they are."""

    rows: int
    layers: int
    candidates: dict[str, tuple[Candidate, ...]]
    tiles: StepTiles
    reasons: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """For a file; `from_json` reads it back."""
        choices = {}
        for op in CHOICES:
            chosen, found = getattr(self.tiles, op), self.candidates[op]
            mine = next((one.microseconds for one in found if one.choice == chosen), None)
            choices[op] = {
                "choice": label(chosen),
                "reason": self.reasons[op],
                "candidates": [_candidate_json(one, chosen, mine) for one in found],
            }
        return {"rows": self.rows, "layers": self.layers, "choices": choices}

    @classmethod
    def from_json(cls, data: dict[str, Any], config: ModelConfig, dtype: torch.dtype) -> Measured:
        """Raises ValueError, KeyError, TypeError or AssertionError if it is not what `to_json` wrote, or not for this model."""
        rows, layers = int(data["rows"]), int(data["layers"])
        found: dict[str, tuple[Candidate, ...]] = {}
        chosen: dict[str, Any] = {}
        reasons: dict[str, str] = {}
        for op in CHOICES:
            one = data["choices"][op]
            found[op] = tuple(
                Candidate(parse(each["tiles"]), _microseconds(each["microseconds"]), str(each.get("failed", "")))
                for each in one["candidates"])  # fmt: skip
            chosen[op], reasons[op] = parse(one["choice"]), str(one["reason"])
            if [each.choice for each in found[op]] != tried(config, op, rows, dtype):
                raise ValueError(f"the candidates for {op} are not those of this model")
            runs = {each.choice: each.microseconds is not None for each in found[op]}
            if not (runs[chosen[op]] if any(runs.values()) else chosen[op] == found[op][0].choice):
                raise ValueError(f"{one['choice']} failed, so it cannot have been chosen for {op}")
        return cls(rows, layers, found, StepTiles(**chosen), reasons)


def _candidate_json(one: Candidate, chosen: Setting, mine: float | None) -> dict[str, Any]:
    """mine: microseconds of the chosen one."""
    found: dict[str, Any] = {"tiles": label(one.choice), "microseconds": one.microseconds}
    if one.microseconds is None:
        found["failed"] = one.problem
    elif one.choice != chosen and mine is not None:
        slower = one.microseconds - mine
        found["lost"] = f"{slower:.1f} us slower" if slower > 0 else "no slower, but within the noise, and less likely"
    return found


def _microseconds(value: Any) -> float | None:
    return None if value is None else float(value)


def label(choice: Setting) -> str:
    """RegisterTiles(16, 64, 8, 4), library, 25 %, or driver's."""
    if isinstance(choice, int):
        return "driver's" if choice == DRIVERS_CHOICE else f"{choice} %"
    return choice if isinstance(choice, str) else f"{type(choice).__name__}({', '.join(map(str, astuple(choice)))})"


def parse(text: str) -> Setting:
    """The choice that has this label. Raises ValueError."""
    if text == "library":
        return "library"
    if text == "driver's":
        return DRIVERS_CHOICE
    if (percent := re.fullmatch(r"(\d{1,3}) %", text)) is not None:
        return int(percent[1])
    match = re.fullmatch(r"(\w+)\(((?:\d+)(?:, \d+)*)\)", text)
    if match is None or match[1] not in _KINDS:
        raise ValueError(f"{text!r} is no choice of tiles")
    try:
        found: Setting = _KINDS[match[1]](*map(int, match[2].split(", ")))
        return found
    except TypeError as error:
        raise ValueError(f"{text!r}: {error}") from None


def tried(config: ModelConfig, op: str, rows: int, dtype: torch.dtype) -> list[Setting]:
    """The candidates that are measured, each once, the default first: of a product's the likeliest, and cuBLAS if it is one."""
    if op == "attention":
        return list(dict.fromkeys(attention_candidates(config, rows)))
    if op == "far":
        return list(dict.fromkeys(far_candidates(config, rows)))
    if op == "shared":
        return list(dict.fromkeys(shared_candidates(config, rows)))
    found = list(dict.fromkeys(candidates(config, op, rows, dtype)))
    return [choice for index, choice in enumerate(found) if index < _MOST_TRIED or choice == "library"]


def with_choice(tiles: StepTiles, op: str, choice: Setting) -> StepTiles:
    return replace(tiles, **{op: choice})  # type: ignore[arg-type]


def choose(found: tuple[Candidate, ...], tie: float) -> Setting | None:
    """The fastest, or one before it in the list that is not more than the share `tie` slower; None if nothing ran."""
    times = [one.microseconds for one in found if one.microseconds is not None]
    near = [one.choice for one in found if one.microseconds is not None and one.microseconds <= min(times) * (1 + tie)]
    return near[0] if near else None


def reason(found: tuple[Candidate, ...], chosen: Setting, layers: int) -> str:
    """Why `choose` chose that. layers: of the measured steps."""
    mine = next((one.microseconds for one in found if one.choice == chosen), None)
    others = [(one.microseconds, label(one.choice)) for one in found if one.microseconds is not None and one.choice != chosen]
    if mine is None:
        said = "default: nothing could be measured"
    else:
        said = f"measured: a step of {layers} layer{'s' * (layers > 1)} takes {mine:.1f} us"
        if others:
            time, name = min(others)
            said += (f", {time - mine:.1f} us less than with {name}" if time >= mine else
                     f", as with {name} ({time:.1f} us) within the noise")  # fmt: skip
        else:
            said += ", there is no other"
    failed = [f"{label(one.choice)} failed: {one.problem}" for one in found if one.microseconds is None]
    return "; ".join([said, *failed])


def explain_row(op: str, low: int, high: int, tiles: StepTiles, measured: Measured | None, config: ModelConfig,
                dtype: torch.dtype) -> dict[str, Any]:  # fmt: skip
    """One choice for steps of `low` to `high` rows, as a row of the dispatch table; JSON-serialisable."""
    choice = getattr(tiles, op)
    times: dict[str, float | None] = dict.fromkeys(map(label, tried(config, op, high, dtype)))
    why = "default, not measured"
    if measured is not None:
        times = {label(one.choice): one.microseconds for one in measured.candidates[op]}
        why = f"{measured.reasons[op]} (for {measured.rows} row{'s' * (measured.rows > 1)})"
    rule = "1 row" if low == high == 1 else f"{high} rows" if low == high else f"{low} to {high} rows"
    name = {"shared": "shared memory", "far": f"attention beyond {NEAR} keys"}.get(op, op)
    return {"op": f"decode {name}", "rule": rule, "candidates": {label(choice): None} | times, "choice": label(choice),
            "reason": why}  # fmt: skip
