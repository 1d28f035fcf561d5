"""Calibration without a GPU: what is chosen of given times, and what is kept."""

from __future__ import annotations

import io
import json
import os
import random
import time
from dataclasses import replace
from functools import partial

import orjson
import pytest
import torch
import yaml

from benchmarks.random_model import hf_config, write_model
from deployments.settings import AppArgs, parse_args
from model_core.cli.main import main
from model_core.dispatch import store
from model_core.dispatch import tiles as tables
from model_core.dispatch.calibrate import Steps, calibrate, nearest, representatives
from model_core.dispatch.measured import CHOICES, Candidate, Measured, choose, label, parse, reason, tried
from model_core.dispatch.ops import Ops
from model_core.dispatch.steps import Occupants, longest_context
from model_core.dispatch.tiles import PRODUCTS, candidates, default_tiles
from model_core.engine import graph_runner
from model_core.engine.config import EngineConfig
from model_core.engine.graph_runner import GraphRunner
from model_core.engine.graphs import row_buckets
from model_core.engine.plan import Limits
from model_core.errors import ConfigError
from model_core.kernels.decode.attention import SplitTiles
from model_core.kernels.decode.products import RowTiles
from model_core.kernels.decode.registers import RegisterTiles
from model_core.kernels.decode.state import DecodeState
from model_core.kernels.decode.streaming import StreamTiles
from model_core.kernels.decode.tiles import TensorTiles, columns
from model_core.model.config import ModelConfig
from model_core.model.decode import DecodeChain
from model_core.model.kv import KVCache
from model_core.model.llama import Llama
from model_core.model.parameters import Parameters

BF16 = torch.bfloat16
CONFIG = ModelConfig.from_hf(hf_config("tinyllama-1.1b"))


def a_model(config=CONFIG, dtype=BF16):
    """Of a real shape, without memory for it."""
    return Llama(config, Parameters.empty(config, dtype=dtype, device="meta"), Ops("cpu"), 2048)


def a_chain(max_seqs=64, *, dtype=BF16, page_size=16):
    model = a_model(dtype=dtype)
    kv = KVCache.empty(CONFIG, 100, page_size, dtype, "meta")
    return DecodeChain(model, kv, DecodeState.empty(max_seqs, 128, "meta"), max_seqs, pdl=False)


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """The same candidates on every machine."""
    monkeypatch.setattr(tables, "has_wgmma", lambda: True)


@pytest.fixture(scope="module")
def chain():
    return a_chain()


def quiet():
    return Steps(io.StringIO())


def no_pool(jobs, workers=None, **options):
    return {}


class FakeTimer:
    """Microseconds of a step by (rows, tiles)."""

    def __init__(self, step=lambda rows, tiles: 100.0):
        self.step, self.seen = step, []

    def __call__(self, rows, tiles, far):
        self.far = far
        self.seen.append((rows, tiles))
        return self.step(rows, tiles)


def takes(**slower):
    """A step takes 100 us, and for each product whose choice is not of the wished kind 5 more."""
    return lambda rows, tiles: 100.0 + sum(5.0 for op, kind in slower.items() if not isinstance(getattr(tiles, op), kind))


LIBRARY_O = takes(o=(str, RowTiles))


# ---- which is measured, which is chosen -------------------------------------------------------------------------------


@pytest.mark.parametrize("most", range(1, 300, 7))
def test_every_bucket_is_spoken_for_by_one_of_the_same_kernels(most):
    buckets = row_buckets(most)
    points = representatives(buckets)
    assert set(points) <= set(buckets) and most in points and len(points) <= 7
    for bucket in buckets:
        point = nearest(bucket, points)
        assert columns(point) == columns(bucket) and (point == 1) == (bucket == 1)
        if bucket in points:
            assert point == bucket
        for op in PRODUCTS:  # what was measured there may run here
            assert set(tried(CONFIG, op, point, BF16)) <= set(candidates(CONFIG, op, bucket, BF16)) or bucket > 8


def test_the_points_of_a_gpus_default():
    points = representatives(row_buckets(256))
    assert points == [1, 8, 16, 32, 64, 128, 256]
    assert [nearest(rows, points) for rows in (2, 24, 48, 112, 160, 224)] == [8, 32, 64, 128, 256, 256]


def test_what_is_tried_begins_with_the_default_and_is_not_much():
    for rows in (1, 2, 8, 16, 32, 64, 256):
        default = default_tiles(CONFIG, rows, BF16)
        for op in CHOICES:
            found = tried(CONFIG, op, rows, BF16)
            assert found[0] == getattr(default, op) and len(set(found)) == len(found)
            if op in PRODUCTS:
                assert len(found) <= 5
                assert "library" in found if rows > 1 else all(isinstance(one, RowTiles) for one in found)


A, B, C = RegisterTiles(16, 64, 8, 4), TensorTiles(64, 128, 4, 4, 5), "library"


@pytest.mark.parametrize("times, chosen, told", [
    ((9.0, 7.0, 8.0), B, "a step of 8 layers takes 7.0 us, 1.0 us less than with library"),
    ((7.05, 7.0, 8.0), A, "within the noise"),
    ((None, None, 8.0), C, "8.0 us, there is no other; RegisterTiles(16, 64, 8, 4) failed: why"),
    ((None, 7.0, 7.1), B, "0.1 us less than with library"),
    ((None, None, None), None, "nothing could be measured"),
])  # fmt: skip
def test_the_fastest_is_chosen_and_says_why(times, chosen, told):
    found = tuple(Candidate(choice, time, "" if time else "why") for choice, time in zip((A, B, C), times, strict=True))
    assert choose(found, 0.01) == chosen
    assert told in reason(found, chosen or A, 8)


@pytest.mark.parametrize("choice", [
    A, B, C, RowTiles(1, 1024, 2), StreamTiles(64, 1, 4, 6), SplitTiles(512, 64, 8, 3, 512), -1, 0, 75], ids=str)  # fmt: skip
def test_a_label_is_read_back(choice):
    assert parse(label(choice)) == choice


@pytest.mark.parametrize("text", ["", "Library", "RowTiles(1, 2)", "Path(1)", "RowTiles(1, 2, x)", "75", "-1 %"])
def test_what_is_no_label_is_refused(text):
    with pytest.raises(ValueError):
        parse(text)


# ---- measuring --------------------------------------------------------------------------------------------------------


def test_choices_are_made_one_after_the_other_beside_the_best_so_far(chain):
    timer, buckets = FakeTimer(takes(o=str, head=str)), row_buckets(64)
    found = calibrate(chain, buckets, quiet(), timer=timer, ahead=no_pool)
    assert list(found) == buckets and found[2] is found[8] is not found[16] and found[24] is found[32]
    assert found[1].tiles == default_tiles(CONFIG, 1, BF16)  # has no such candidates
    default, chosen = default_tiles(CONFIG, 32, BF16), found[32].tiles
    assert default == replace(chosen, o=default.o, head=default.head) and found[32].layers == 8
    assert chosen.o == chosen.head == "library"
    assert [one.microseconds for one in found[32].candidates["qkv"]] == [110.0] * len(found[32].candidates["qkv"])
    assert found[32].candidates["head"][0].microseconds == 105.0  # its default, beside the chosen o
    assert {one.microseconds for one in found[32].candidates["shared"]} == {100.0}
    assert "100.0 us, 5.0 us less than with" in found[32].reasons["head"]
    steps = [tiles for rows, tiles in timer.seen if rows == 32]
    measured = [op for op in CHOICES for _ in found[32].candidates[op]]
    for op, tiles in zip(measured, steps, strict=True):  # who has not had its turn is the default
        later = CHOICES[CHOICES.index(op) + 1 :]
        assert all(getattr(tiles, other) == getattr(default, other) for other in later)


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_ran_and_only_what_is_clearly_faster_replaces_the_default(chain, seed):
    dice = random.Random(seed)

    def step(rows, tiles):
        if dice.random() < 0.4:
            raise RuntimeError("no")
        return dice.choice([100.0, 100.5, 103.0])

    for rows, one in calibrate(chain, [1, 8, 32], quiet(), timer=FakeTimer(step), ahead=no_pool).items():
        default = default_tiles(CONFIG, rows, BF16)
        for op in CHOICES:
            times = {each.choice: each.microseconds for each in one.candidates[op]}
            ran = [time for time in times.values() if time is not None]
            chosen, first = times[getattr(one.tiles, op)], times[getattr(default, op)]
            assert chosen is not None and chosen <= 1.01 * min(ran) if ran else getattr(one.tiles, op) == getattr(default, op)
            if first is not None and first <= 1.01 * min(ran):
                assert getattr(one.tiles, op) == getattr(default, op)
        assert Measured.from_json(json.loads(json.dumps(one.to_json())), CONFIG, BF16) == one


def test_candidates_that_raise_are_recorded_and_never_chosen(chain):
    def step(rows, tiles):
        if isinstance(tiles.qkv, StreamTiles):
            raise RuntimeError("out of resource: shared memory\nmore")
        return 100.0

    found = calibrate(chain, [1, 8], quiet(), timer=FakeTimer(step), ahead=no_pool)[8]
    default = default_tiles(CONFIG, 8, BF16)
    assert isinstance(default.qkv, StreamTiles) and isinstance(found.tiles.qkv, RegisterTiles)
    assert found.tiles == replace(default, qkv=found.tiles.qkv)
    failed = [one for one in found.candidates["qkv"] if one.microseconds is None]
    assert {type(one.choice) for one in failed} == {StreamTiles}
    assert failed[0].problem == "RuntimeError: out of resource: shared memory"
    assert "nothing could be measured" in found.reasons["attention"] and "measured: " in found.reasons["gate_up"]


def test_where_nothing_can_be_measured_the_defaults_stay(chain):
    def step(rows, tiles):
        raise RuntimeError("no")

    found = calibrate(chain, [1, 8], quiet(), timer=FakeTimer(step), ahead=no_pool)
    assert [found[rows].tiles for rows in (1, 8)] == [default_tiles(CONFIG, rows, BF16) for rows in (1, 8)]
    assert "nothing could be measured" in found[8].reasons["down"]


def test_a_step_that_crashed_its_compiler_is_not_launched(chain):
    library = lambda tiles: tiles.down == "library"  # noqa: E731

    def ahead(jobs, workers=None, **options):
        return {index: "its compiler crashed" for index, job in enumerate(jobs) if library(job.args[1])}

    timer = FakeTimer(lambda rows, tiles: 50.0 if library(tiles) else 100.0)
    found = calibrate(chain, [8], quiet(), timer=timer, ahead=ahead)[8]
    assert [one.problem for one in found.candidates["down"] if one.microseconds is None] == ["its compiler crashed"]
    assert found.tiles.down != "library" and not any(library(tiles) for _, tiles in timer.seen)


def test_every_step_is_compiled_and_has_its_workspace_before_it_is_launched():
    chain, compiled, batches = a_chain(), set(), []

    def ahead(jobs, workers=None, **options):
        batches.append(len(jobs))
        for job in jobs:
            longest = job.keywords["longest"]
            assert job.func == chain.launch and job.keywords == {"longest": longest, "layers": 2} and longest in (512, 2048)
            rows, tiles = job.args
            step = len(rows), tiles.attention_to(longest), longest > 512, *(getattr(tiles, op) for op in PRODUCTS)
            assert tiles.shared == -1 and step not in compiled
            compiled.add(step)
        return {}

    def step(rows, tiles):
        chosen = tiles.attention_to(2048 if timer.far else 512), timer.far, *(getattr(tiles, op) for op in PRODUCTS)
        assert (rows, *chosen) in compiled
        space = chain.space
        chain.reserve(rows, tiles)
        assert chain.space is space
        return LIBRARY_O(rows, tiles)

    timer = FakeTimer(step)
    found = calibrate(chain, [1, 8, 32], quiet(), timer=timer, ahead=ahead)
    assert found[32].tiles.o == "library"
    singly = sum(len(tried(CONFIG, op, rows, BF16)) - 1 for op in CHOICES[:-1] for rows in (1, 8, 32)) + 2 * 3
    assert batches[0] == singly  # the defaults, near and far, and each deviation from them; then what follows from o's choice
    moved = [rows for rows in (8, 32) if found[rows].tiles.o != default_tiles(CONFIG, rows, BF16).o]
    heads = sum(len(tried(CONFIG, "head", rows, BF16)) - 1 for rows in moved)
    assert heads and batches[1:] == [heads, sum(len(tried(CONFIG, "far", rows, BF16)) for rows in moved)]


@pytest.mark.parametrize("pages, position", [(4000, 256), (30, 256), (2, 256)])
def test_sequences_of_garbage_come_and_go(pages, position):
    state = DecodeState.empty(8, 128, "cpu")
    chain = DecodeChain(a_model(), KVCache.empty(CONFIG, pages, 16, BF16, "meta"), state, 8, pdl=False)
    sequences = Occupants(chain, 8)
    assert state.position.tolist() == [position] * 8 + [0]
    used = state.block_tables[:8]
    assert used.min() == 1 and used.max() <= pages - 1 and not state.block_tables[8].any()
    assert len(used.unique()) == min(used.numel(), pages - 1) or pages == 4000 and len(used.unique()) == used.numel()
    state.position[:8] += 3
    sequences.place()
    assert state.position.tolist() == [position] * 8 + [0]
    sequences.place(far=True)
    far = state.position[:8].float()
    assert abs(far.mean() - 1024) < 8 and abs(far[0] - 1024) < 150 and far.min() < 200 and far.max() > 1850
    sequences.leave()
    assert not any(tensor.any() for tensor in (state.position, state.block_tables, state.last_token))


@pytest.mark.parametrize("max_pages", [1, 2, 16, 18])
def test_short_contexts_are_measured_within_their_bounds(max_pages):
    state = DecodeState.empty(4, max_pages, "cpu")
    chain = DecodeChain(a_model(), KVCache.empty(CONFIG, 50, 16, BF16, "meta"), state, 4, pdl=False)
    assert longest_context(chain) == 16 * max_pages
    sequences = Occupants(chain, 4)
    assert 0 < sequences.near <= min(256, 16 * max_pages - 4)
    assert sequences.far.min() >= 0 and sequences.near <= sequences.far.max() <= 16 * max_pages - 4


def test_progress_is_counted_in_things():
    text = io.StringIO()
    progress = Steps(text, interval=0.0)
    progress.begin("measuring", 4)
    progress.advance(1)
    progress.advance(3)
    progress.end()
    lines = text.getvalue().splitlines()
    assert lines[0].startswith("measuring [########......................] 1 of 4")
    assert lines[1].startswith("measuring [##############################] 4 of 4") and lines[2].startswith("measuring: 4 in")


# ---- keeping ----------------------------------------------------------------------------------------------------------

BUCKETS = [1, 2, 4, 8]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mini-llm" / "dispatch"


class Count:
    """A calibration that counts how often it was asked for."""

    def __init__(self):
        self.times = 0

    def __call__(self, chain, buckets, progress, **options):
        self.times += 1
        return calibrate(chain, buckets, progress, timer=FakeTimer(LIBRARY_O), ahead=no_pool)


def ask(chain, count, mode="auto"):
    return store.measured_choices(chain, BUCKETS, mode, quiet(), measure=count)


def test_what_was_measured_is_read_back(chain, cache):
    count = Count()
    first = ask(chain, count)
    assert ask(chain, count) == first and count.times == 1
    assert ask(chain, count, "again") == first and count.times == 2
    (file,) = cache.glob("*.json")
    data = json.loads(file.read_text())
    assert data["speaks_for"] == {"1": 1, "2": 8, "4": 8, "8": 8} and data["model"]["hidden_size"] == 2048
    assert list(data["measured"][1]["choices"]) == list(CHOICES) and "whole step" in data["about"]
    product = data["measured"][1]["choices"]["o"]
    assert product["choice"] == "library" and "us less than with" in product["reason"]
    assert product["candidates"][0]["lost"] == "5.0 us slower"
    count = sum(len(tried(CONFIG, op, rows, BF16)) for op in CHOICES for rows in (1, 8))
    assert sum(line.count('{"tiles": ') == line.count("}") == 1 for line in file.read_text().splitlines()) == count


@pytest.mark.parametrize("damage", [
    lambda text: text[: len(text) // 2], lambda text: "", lambda text: "[]", lambda text: "{}",
    lambda text: text.replace("RegisterTiles(16", "RegisterTiles(17"), lambda text: text.replace('"choice": "', '"choice": "X'),
    lambda text: text.replace('"dtype": "bfloat16"', '"dtype": "float32"'),
    lambda text: text.replace('"microseconds": 105.0', '"microseconds": "x"', 1),
    lambda text: text.replace('"o": {', '"p": {'), lambda text: text.replace('"8": 8', '"8": 9'),
    lambda text: text.replace('"choice": "RowTiles(8, 2048, 2)"', '"choice": "library"'),
    lambda text: text.replace('"tiles": "library", "microseconds": 100.0', '"tiles": "library", "microseconds": null'),
], ids=range(12))  # fmt: skip
def test_a_damaged_or_foreign_file_is_measured_again(chain, cache, caplog, damage):
    count = Count()
    first = ask(chain, count)
    (file,) = cache.glob("*.json")
    whole = file.read_text()
    assert damage(whole) != whole
    file.write_text(damage(whole))
    with caplog.at_level("WARNING", "mini_llm.dispatch"):
        assert ask(chain, count) == first and count.times == 2
    assert "is not used, and measured again" in caplog.text
    assert ask(chain, count) == first and count.times == 2
    assert [path.name for path in cache.iterdir() if path.suffix == ".json"] == [file.name]


def test_a_cache_that_cannot_be_written_costs_only_the_file(chain, tmp_path, monkeypatch, caplog):
    (tmp_path / "mini-llm").write_text("a file in its place")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    count = Count()
    assert ask(chain, count)[8].rows == 8 and count.times == 1
    assert "the next start measures again" in caplog.text


def test_another_replica_that_measured_meanwhile_is_believed(chain, cache, monkeypatch):
    count = Count()
    alone = store._alone

    def slow(path):
        first = Count()
        with alone(path):
            found = first(chain, BUCKETS, quiet())
            store.save(store.facts(chain, BUCKETS), found, 1.0)
        os.utime(path, (time.time() + 1, time.time() + 1))
        return alone(path)

    monkeypatch.setattr(store, "_alone", slow)
    assert ask(chain, count)[8].rows == 8 and count.times == 0


def test_the_key_changes_with_what_times_depend_on(chain, monkeypatch):
    wide, large_pages = a_chain(dtype=torch.float32), a_chain(page_size=32)
    asked = [(chain, BUCKETS), (chain, [1, 2]), (wide, BUCKETS), (large_pages, BUCKETS)]
    keys = [store.path_of(store.facts(one, buckets)) for one, buckets in asked]
    monkeypatch.setattr(store, "machine", lambda device: {"gpu": "another", "multiprocessors": 114, "driver": "1"})
    keys.append(store.path_of(store.facts(chain, BUCKETS)))
    monkeypatch.setattr(store, "source_hash", lambda: "other kernels")
    keys.append(store.path_of(store.facts(chain, BUCKETS)))
    monkeypatch.setattr(torch, "__version__", "2.99")
    keys.append(store.path_of(store.facts(chain, BUCKETS)))
    assert len(set(keys)) == len(keys)


def test_the_hash_is_of_names_and_contents_of_kernel_sources(tmp_path):
    (tmp_path / "decode").mkdir()
    file = tmp_path / "decode" / "a.py"
    file.write_text("x = 1\n")
    found = [store.source_hash(tmp_path)]
    (tmp_path / "notes.txt").write_text("no source")
    assert store.source_hash(tmp_path) == found[0]
    file.write_text("x = 2\n")
    found.append(store.source_hash(tmp_path))
    file.rename(tmp_path / "decode" / "b.py")
    found.append(store.source_hash(tmp_path))
    assert len(set(found)) == 3 and store.source_hash() == store.source_hash()


# ---- explaining -------------------------------------------------------------------------------------------------------


def a_runner(max_seqs=64):
    model, device = a_model(), torch.device("meta")
    return GraphRunner(model, Ops("cpu"), KVCache.empty(CONFIG, 100, 16, BF16, "meta"), Limits(max_seqs, 256, 2048), 16, device,
                       pdl=False)  # fmt: skip


def spans(rows, op):
    """(first, last) numbers of rows that the table's rules for `op` cover."""
    found = []
    for row in rows:
        if row["op"] == op:
            numbers = [int(word) for word in row["rule"].split() if word.isdecimal()]
            found.append((numbers[0], numbers[-1]) if " to " in row["rule"] else (numbers[0], numbers[0]))
    return found


def test_explain_before_and_after_measuring(cache, monkeypatch):
    runner = a_runner()
    before = runner.explain()
    assert {row["reason"] for row in before if row["op"] == "decode qkv"} == {"default, not measured"}
    monkeypatch.setattr(graph_runner, "measured_choices", partial(store.measured_choices, measure=Count()))
    runner.calibrate("auto")
    rows = runner.explain()
    for table in (before, rows):
        assert orjson.loads(orjson.dumps(table)) == json.loads(json.dumps(table)) == table  # as /debug/dispatch sends it
        for op in (*PRODUCTS, "attention", "shared memory"):
            covered = spans(table, f"decode {op}")
            assert covered[0] == (1, 1) and covered[-1][1] == 64
            assert all(low == high + 1 for (_, high), (low, _) in zip(covered, covered[1:], strict=False))
        assert {row["op"] for row in table} >= {"decode attention", "decode shared memory", "prefill rmsnorm"}
        assert all(row.keys() == {"op", "rule", "candidates", "choice", "reason"} for row in table)
    row = next(row for row in rows if row["op"] == "decode o" and row["rule"].endswith("to 8 rows"))
    assert row["rule"] == "2 to 8 rows" and row["choice"] == "library"
    assert row["candidates"][row["choice"]] == 100.0
    assert row["reason"].startswith("measured: a step of 8 layers takes 100.0 us") and row["reason"].endswith("(for 8 rows)")
    tiles = runner.decodes.tiles[2]
    assert label(tiles.o) == row["choice"] and runner.decodes.tiles[1].in_rows
    floats, arrived = runner.decodes.chain.space.part.numel(), runner.decodes.chain.space.arrived.numel()
    runner.decodes.chain.reserve(2, tiles)
    assert (floats, arrived) == (runner.decodes.chain.space.part.numel(), runner.decodes.chain.space.arrived.numel())


def test_the_command_on_a_cpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    folder = write_model("tiny", tmp_path / "tiny", dtype=torch.float32)
    assert main(["dispatch", str(folder), "--device", "cpu", "--kv-cache-bytes", str(1 << 20), "--all"]) == 0
    out = capsys.readouterr().out
    assert "tiny on cpu, float32" in out and "the device is a CPU" in out and "swiglu" in out


def test_the_option():
    with pytest.raises(ConfigError, match="calibration must be one of auto, off, again, got 'never'"):
        EngineConfig(calibration="never")
    for text in ("off", "'off'", "again"):
        engine = parse_args(yaml.safe_load(f"engine: {{calibration: {text}}}"), AppArgs).engine
        assert engine.config("cpu").calibration == text.strip("'")
    with pytest.raises(ConfigError, match="calibration"):
        parse_args({"engine": {"calibration": True}}, AppArgs)


