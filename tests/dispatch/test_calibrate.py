"""Calibration without a GPU: what is chosen of given times, what is kept, and that compiling ahead can only help."""

from __future__ import annotations

import io
import json
import os
import pickle
import threading
import time
from functools import partial

import orjson
import pytest
import torch
import yaml

from benchmarks.random_model import hf_config, write_model
from deployments.settings import AppArgs, parse_args
from model_core.cli.main import main
from model_core.dispatch import compile as compiler
from model_core.dispatch import store
from model_core.dispatch.calibrate import Steps, calibrate, nearest, representatives
from model_core.dispatch.compile import compile_ahead
from model_core.dispatch.measured import Candidate, Measured, choose, label, parse, reason, tried
from model_core.dispatch.ops import Ops
from model_core.dispatch.tiles import PRODUCTS, candidates, default_split, default_tiles
from model_core.engine import graph_runner
from model_core.engine.config import EngineConfig
from model_core.engine.engine import Engine
from model_core.engine.graph_runner import GraphRunner
from model_core.engine.graphs import row_buckets
from model_core.engine.plan import Limits
from model_core.engine.request import Request, SamplingParams
from model_core.errors import ConfigError
from model_core.kernels.decode.embed import embed
from model_core.kernels.decode.products import RowTiles
from model_core.kernels.decode.registers import RegisterTiles
from model_core.kernels.decode.state import DecodeState
from model_core.kernels.decode.tiles import Stream, TensorTiles, columns
from model_core.model.config import ModelConfig
from model_core.model.decode import DecodeChain
from model_core.model.kv import KVCache
from model_core.model.llama import Llama
from model_core.model.parameters import Parameters

BF16 = torch.bfloat16
CONFIG = ModelConfig.from_hf(hf_config("tinyllama-1.1b"))
TARGET = ("cuda", 90, 32)


def a_model(config=CONFIG, dtype=BF16):
    """Of a real shape, without memory for it."""
    return Llama(config, Parameters.empty(config, dtype=dtype, device="meta"), Ops("cpu"), 2048)


def a_chain(max_seqs=64, *, dtype=BF16, page_size=16):
    model = a_model(dtype=dtype)
    kv = KVCache.empty(CONFIG, 100, page_size, dtype, "meta")
    return DecodeChain(model, kv, DecodeState.empty(max_seqs, 128, "meta"), max_seqs, default_split(CONFIG), pdl=False)


@pytest.fixture(scope="module")
def chain():
    return a_chain()


def quiet():
    return Steps(io.StringIO())


def no_pool(jobs, workers=None, **options):
    return {}


class FakeTimer:
    """Microseconds by what the first call is about: (choice) -> time of a product, (tiles) -> time of a step."""

    def __init__(self, product=lambda choice: 10.0, step=lambda tiles: 100.0):
        self.product, self.step, self.seen = product, step, []

    def __call__(self, calls):
        call = calls[0]
        if "longest" in call.keywords:
            return self.step(call.args[2])
        self.seen.append((call.args[-1], len(calls)))
        return self.product(call.args[-1])


def prefers(kind):
    return lambda choice: 5.0 if isinstance(choice, kind) else 10.0


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
    assert [nearest(rows, points) for rows in (2, 24, 48, 112, 160, 224)] == [8, 32, 64, 128, 128, 256]


def test_what_is_tried_begins_with_the_default_and_ends_with_what_always_fits():
    for rows in (1, 2, 8, 16, 32, 64, 256):
        for op in PRODUCTS:
            found = tried(CONFIG, op, rows, BF16)
            assert found[0] == getattr(default_tiles(CONFIG, rows, BF16), op)
            assert len(set(found)) == len(found) <= 9
            assert found[-1] == "library" if rows > 1 else all(isinstance(one, RowTiles) for one in found)


A, B, C = RegisterTiles(16, 64, 8, 4), TensorTiles(64, 128, 4, 4, 5), "library"


@pytest.mark.parametrize("times, chosen, told", [
    ((9.0, 7.0, 8.0), B, "7.00 us, 1.00 us faster than library"),
    ((7.05, 7.0, 8.0), A, "within the noise"),
    ((None, None, 8.0), C, "8.00 us, alone; RegisterTiles(16, 64, 8, 4) failed: why"),
    ((None, 7.0, 7.01), B, "0.01 us faster than library"),
    ((None, None, None), None, "nothing could be measured"),
])  # fmt: skip
def test_the_fastest_is_chosen_and_says_why(times, chosen, told):
    found = tuple(Candidate(choice, time, "" if time else "why") for choice, time in zip((A, B, C), times, strict=True))
    assert choose(found, 0.01) == chosen
    assert told in reason(found, chosen or A)


@pytest.mark.parametrize("choice", [A, B, C, RowTiles(1, 1024, 2)], ids=str)
def test_a_label_is_read_back(choice):
    assert parse(label(choice)) == choice


@pytest.mark.parametrize("text", ["", "Library", "RowTiles(1, 2)", "Path(1)", "RowTiles(1, 2, x)"])
def test_what_is_no_label_is_refused(text):
    with pytest.raises(ValueError):
        parse(text)


# ---- measuring --------------------------------------------------------------------------------------------------------


def test_calibrate_takes_the_fastest_of_each_product_if_steps_agree(chain):
    timer = FakeTimer(prefers(TensorTiles), lambda tiles: 90.0 if isinstance(tiles.o, TensorTiles) else 100.0)
    buckets = row_buckets(64)
    found = calibrate(chain, buckets, quiet(), timer=timer, ahead=no_pool)
    assert list(found) == buckets and found[2] is found[8] is not found[16] and found[24] is found[32]
    assert found[1].tiles == default_tiles(CONFIG, 1, BF16) and found[1].step == {}
    chosen = found[8].tiles
    assert isinstance(chosen.o, TensorTiles) and isinstance(chosen.head, TensorTiles)
    assert chosen.qkv == default_tiles(CONFIG, 8, BF16).qkv  # has no such tiles
    assert found[8].step == {"default": 100.0, "fastest": 90.0}
    assert {count for _, count in timer.seen} == {CONFIG.num_layers, 4}  # every layer's own weights; a few heads


def test_whole_steps_have_the_last_word(chain):
    timer = FakeTimer(prefers(TensorTiles), lambda tiles: 101.0 if isinstance(tiles.o, TensorTiles) else 100.0)
    found = calibrate(chain, [1, 8], quiet(), timer=timer, ahead=no_pool)[8]
    assert found.tiles == default_tiles(CONFIG, 8, BF16)
    assert "a whole step takes 100.0 us, with the fastest of each product 101.0 us, though TensorTiles" in found.reasons["o"]
    assert found.reasons["qkv"].startswith("measured: 10.00 us")


def test_candidates_that_raise_are_recorded_and_never_chosen(chain):
    def product(choice):
        if isinstance(choice, RegisterTiles):
            raise RuntimeError("out of resource: shared memory\nmore")
        return 10.0

    found = calibrate(chain, [1, 8], quiet(), timer=FakeTimer(product), ahead=no_pool)[8]
    assert found.tiles.qkv == "library" and isinstance(found.tiles.o, TensorTiles)
    failed = [one for one in found.candidates["qkv"] if one.microseconds is None]
    assert {type(one.choice) for one in failed} == {RegisterTiles}
    assert failed[0].problem == "RuntimeError: out of resource: shared memory"


def test_where_nothing_can_be_measured_the_defaults_stay(chain):
    def product(choice):
        raise RuntimeError("no")

    found = calibrate(chain, [1, 8], quiet(), timer=FakeTimer(product), ahead=no_pool)
    assert [found[rows].tiles for rows in (1, 8)] == [default_tiles(CONFIG, rows, BF16) for rows in (1, 8)]
    assert "nothing could be measured" in found[8].reasons["down"]


def test_a_kernel_that_crashed_its_compiler_is_not_launched(chain):
    def ahead(jobs, workers=None, **options):
        return {index: "its compiler crashed" for index, job in enumerate(jobs) if job.func is not chain.launch
                and job.args[1] == "o" and isinstance(job.args[-1], RegisterTiles)}  # fmt: skip

    timer = FakeTimer()
    found = calibrate(chain, [8], quiet(), timer=timer, ahead=ahead)[8]
    assert isinstance(found.tiles.o, TensorTiles) and isinstance(found.tiles.qkv, RegisterTiles)
    crashed = [one for one in found.candidates["o"] if one.microseconds is None]
    assert crashed and all(one.problem == "its compiler crashed" for one in crashed)
    assert sum(isinstance(choice, RegisterTiles) for choice, _ in timer.seen) == 4 * len(crashed)


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
        step = lambda tiles: 90.0 if isinstance(tiles.o, TensorTiles) else 100.0  # noqa: E731
        return calibrate(chain, buckets, progress, timer=FakeTimer(prefers(TensorTiles), step), ahead=no_pool)


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
    product = data["measured"][1]["products"]["o"]
    assert product["choice"].startswith("TensorTiles") and "faster than" in product["reason"]
    assert product["candidates"][0]["lost"] == "5.00 us slower"


@pytest.mark.parametrize("damage", [
    lambda text: text[: len(text) // 2], lambda text: "", lambda text: "[]", lambda text: "{}",
    lambda text: text.replace("RegisterTiles(16", "RegisterTiles(17"), lambda text: text.replace('"choice": "', '"choice": "X'),
    lambda text: text.replace('"dtype": "bfloat16"', '"dtype": "float32"'),
    lambda text: text.replace('"microseconds": 5.0', '"microseconds": "x"'),
    lambda text: text.replace('"o": {', '"p": {'), lambda text: text.replace('"8": 8', '"8": 9'),
    lambda text: text.replace('"choice": "RowTiles(8, 2048, 2)"', '"choice": "library"'),
], ids=range(11))  # fmt: skip
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
        for op in PRODUCTS:
            covered = spans(table, f"decode {op}")
            assert covered[0] == (1, 1) and covered[-1][1] == 64
            assert all(low == high + 1 for (_, high), (low, _) in zip(covered, covered[1:], strict=False))
        assert {row["op"] for row in table} >= {"decode attention", "prefill rmsnorm"}
        assert all(row.keys() == {"op", "rule", "candidates", "choice", "reason"} for row in table)
    row = next(row for row in rows if row["op"] == "decode o" and row["rule"].endswith("to 8 rows"))
    assert row["rule"] == "2 to 8 rows" and row["choice"].startswith("TensorTiles(64")
    assert row["candidates"][row["choice"]] == 5.0
    assert row["reason"].startswith("measured: 5.00 us") and row["reason"].endswith("(for 8 rows)")
    tiles = runner.decodes.tiles[2]
    assert label(tiles.o) == row["choice"] and runner.decodes.tiles[1].in_rows
    floats, arrived = runner.decodes.chain.space.part.numel(), runner.decodes.chain.space.arrived.numel()
    runner.decodes.chain.reserve(2, tiles)
    assert (floats, arrived) == (runner.decodes.chain.space.part.numel(), runner.decodes.chain.space.arrived.numel())


def test_measured_survives_json(chain):
    found = calibrate(chain, [8], quiet(), timer=FakeTimer(prefers(TensorTiles)), ahead=no_pool)[8]
    assert Measured.from_json(json.loads(json.dumps(found.to_json())), CONFIG, BF16) == found


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


# ---- compiling ahead --------------------------------------------------------------------------------------------------


@pytest.fixture
def workers(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield tmp_path / "triton"
    compiler.release()
    assert not list(tmp_path.glob("mini-llm-compile-*"))


def an_embed(hidden, vocab=100):
    rows, table, gain = torch.zeros(2, dtype=torch.int64), torch.zeros(vocab, hidden), torch.zeros(hidden)
    return partial(embed, table, gain, rows, rows, Stream(2, hidden, torch.float32, "cpu"), pdl=False)


def test_kernels_land_in_the_cache_and_a_job_that_raises_harms_nobody(workers):
    jobs = [an_embed(32), partial(int, "no number"), an_embed(64), an_embed(64)]
    assert compile_ahead(jobs, 2, target=TARGET, stamp="these") == {}
    assert len(list(workers.rglob("*.cubin"))) == 2
    compiler.release()
    assert compile_ahead(jobs, 2, target=TARGET, stamp="these") == {} and compiler._pool is None  # at once


def test_workers_that_die_are_harmless(workers, caplog):
    assert compile_ahead([partial(os._exit, 3)] * 2, 2, target=TARGET, stamp="dying") == {}
    assert "launches compile instead" in caplog.text and compiler._pool is None
    assert not list(workers.glob("mini-llm-*[!k]"))  # no stamp: the next start tries again


@pytest.mark.parametrize("break_it", ["executable", "pickle", "timeout"])
def test_a_pool_that_fails_is_harmless(workers, monkeypatch, caplog, break_it):
    jobs, timeout_s = [partial(int, 1)] * 2, 60.0
    if break_it == "executable":
        monkeypatch.setattr("sys.executable", "/nowhere/python")
    elif break_it == "pickle":
        jobs = [lambda: None] * 2
    else:
        jobs, timeout_s = [partial(time.sleep, 100)] * 2, 0.2
    assert compile_ahead(jobs, 2, target=TARGET, timeout_s=timeout_s) == {}
    assert compiler._pool is None and ("not compiled ahead" in caplog.text or "takes too long" in caplog.text)


def test_one_core_or_nothing_to_do_starts_no_process(monkeypatch):
    monkeypatch.setattr(compiler, "_open", None)
    assert compile_ahead([an_embed(32)] * 2, 1) == compile_ahead([], 8) == {}


def test_the_kernel_that_took_its_compiler_down_is_named(tmp_path):
    pool = object.__new__(compiler._Pool)
    pool.folder, pool._batch = tmp_path, 1
    (tmp_path / "claims").mkdir()
    claims = ["1 4\n", "1 5\nok", "1 6\nkernel: CompilationError: at 3:1", "0 7\n", ""]
    for number, text in enumerate(claims):
        (tmp_path / "claims" / str(number)).write_text(text)
    assert pool._died() == {4: "its compiler crashed"}


def test_twins_have_everything_but_memory():
    base = torch.zeros(100, dtype=torch.float32)
    values = {"view": base[3:].as_strided((4, 5), (7, 1)), "row": base[:0], "scalar": torch.tensor(3), "plain": [base, base]}
    text = io.BytesIO()
    compiler._Pickler(text).dump(values)
    twins = pickle.loads(text.getvalue())
    for name in ("view", "row", "scalar"):
        twin, value = twins[name], values[name]
        assert twin.device.type == "meta"
        assert (twin.shape, twin.stride(), twin.dtype) == (value.shape, value.stride(), value.dtype)
        assert value.numel() == 0 or twin.data_ptr() % 16 == value.data_ptr() % 16
    assert twins["plain"][0] is twins["plain"][1]


# ---- on a GPU ---------------------------------------------------------------------------------------------------------


def greedy(folder, requests, **config):
    engine = Engine.load(folder, EngineConfig(device="cuda", kv_cache_bytes=8 << 20, max_seqs=12, **config))
    tokens, logprobs, left, done = {}, {}, {request.request_id for request in requests}, threading.Event()

    def on_step(events):
        for event in events:
            tokens.setdefault(event.request_id, []).extend(event.token_ids)
            logprobs.setdefault(event.request_id, []).extend(event.logprobs or [])
            left.discard(event.request_id) if event.finish else None
        if not left:
            done.set()

    engine.start(on_step)
    for request in requests:
        engine.submit(request)
    assert done.wait(120), engine.failure
    table, startup = engine.dispatch_table(), dict(engine.parts.startup)
    engine.shutdown()
    return tokens, logprobs, table, startup


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_calibrated_engine_gives_the_default_ones_tokens(tmp_path, cache, dtype):
    folder = write_model("tiny", tmp_path / "tiny", dtype=torch.float32)
    prompts = [[(7 * place * place + 31 * row + place) % 500 for place in range(3 + 5 * row)] for row in range(10)]
    requests = [Request(f"r{row}", prompt, SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True, logprobs=3))
                for row, prompt in enumerate(prompts)]  # fmt: skip
    wanted, wanted_logprobs, table, startup = greedy(folder, requests, dtype=dtype, calibration="off")
    assert "calibration" not in startup and not any("measured:" in row["reason"] for row in table)
    got, got_logprobs, table, startup = greedy(folder, requests, dtype=dtype, calibration="auto")
    assert startup["calibration"] > 0 and len(list(cache.glob("*.json"))) == 1
    assert all("measured:" in row["reason"] or "default" in row["reason"] for row in table if row["op"].startswith("decode"))
    assert any(time is not None for row in table if row["op"] == "decode qkv" for time in row["candidates"].values())
    if dtype == "float32":
        assert got == wanted
    else:  # flat logits in 8 bits: tokens may part ways, their probabilities not by much
        for key in wanted:
            assert abs(got_logprobs[key][1].logprob - wanted_logprobs[key][1].logprob) < 0.03
    again, _, table_again, startup = greedy(folder, requests, dtype=dtype, calibration="auto")
    assert (again, table_again) == (got, table) and startup["calibration"] < 1.0
