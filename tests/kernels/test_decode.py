"""The fused decode kernels, in rows and in tensor-core tiles, against their float32 references."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from model_core.dispatch.tiles import attention_candidates, far_candidates
from model_core.kernels.decode.attention import SplitSpace, SplitTiles, attention, attention_torch
from model_core.kernels.decode.embed import embed, embed_torch, write_stream_torch
from model_core.kernels.decode.gate_up import gate_up, gate_up_library, gate_up_tiles, gate_up_torch
from model_core.kernels.decode.head import head, head_library, head_tiles, head_torch
from model_core.kernels.decode.products import RowTiles, chains_launches
from model_core.kernels.decode.project import project, project_library, project_tiles, project_tiles_torch, project_torch
from model_core.kernels.decode.qkv import qkv, qkv_library, qkv_tiles, qkv_torch
from model_core.kernels.decode.registers import RegisterTiles
from model_core.kernels.decode.sample import SampleSpace, sample, sample_torch
from model_core.kernels.decode.state import DecodeState
from model_core.kernels.decode.streaming import StreamTiles
from model_core.kernels.decode.tiles import Stream, TensorTiles, TileSpace
from tests.kernels.chosen import chosen, own_chosen

GPU = torch.cuda.is_available()
PAGE, VOCAB, CONTEXT, EPS = 16, 336, 512, 1e-5
ROWS = RowTiles(4, 64, 4)
TILES = [TensorTiles(16, 32, 1, 4, 2), TensorTiles(16, 32, 2, 4, 2), TensorTiles(16, 64, 1, 4, 3)]
IDS = ["tiles", "split tiles", "tiles with a tail"]


class Case:
    """Weights and state of one small layer; five slots, rows that point to three of them in disorder."""

    def __init__(self, dtype, device, hidden=96, heads=4, kv_heads=2, dim=32, inner=64):
        def random(*shape, scale=1.0):
            return (torch.randn(shape, device=device) * scale).to(dtype)

        self.heads, self.kv_heads, self.dim, self.hidden, self.inner = heads, kv_heads, dim, hidden, inner
        self.pdl = chains_launches(torch.device(device))
        self.state = state = DecodeState.empty(4, CONTEXT // PAGE, device)
        state.position[:3] = torch.tensor([5, 31, 200])
        state.last_token[:4] = torch.tensor([3, 300, 17, 99])
        state.block_tables[:3] = (torch.randperm(3 * CONTEXT // PAGE) + 1).view(3, -1).int()
        state.temperature[:3] = torch.tensor([0.0, 0.7, 1.3])
        state.seed[:3] = torch.tensor([1, 2**62 + 12345, 7])
        self.rows = torch.tensor([2, 0, 1], device=device)
        self.embed, self.x = random(VOCAB, hidden), random(3, hidden)
        self.gain = (torch.rand(hidden, device=device) + 0.5).to(dtype)
        self.bias = random((heads + 2 * kv_heads) * dim)
        self.w_qkv = random((heads + 2 * kv_heads) * dim, hidden, scale=hidden**-0.5)
        self.w_o = random(hidden, heads * dim, scale=(heads * dim) ** -0.5)
        self.w_gate_up = random(2 * inner, hidden, scale=hidden**-0.5)
        self.w_head = random(VOCAB, hidden, scale=hidden**-0.5)
        angles = torch.rand(CONTEXT, dim // 2, device=device) * 6
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
        self.k, self.v = (torch.full((100, PAGE, kv_heads, dim), float("nan"), dtype=dtype, device=device) for _ in range(2))
        self.random = random
        self.fill()
        self.q = random(3, heads, dim)
        self.space = TileSpace(400_000, 1000, device)

    def fill(self):
        """Keys and values up to each slot's position; what lies behind stays NaN."""
        for slot in range(3):
            n = torch.arange(int(self.state.position[slot]) + 1, device=self.k.device)
            page = self.state.block_tables[slot, n // PAGE].long()
            for cache in (self.k, self.v):
                cache[page, n % PAGE] = self.random(len(n), self.kv_heads, self.dim)

    def stream(self, x, dtype=None):
        stream = Stream(max(5, len(x)), self.hidden, dtype or x.dtype, x.device)
        write_stream_torch(x.float(), self.gain, stream)
        return stream

    def check_qkv(self, close, inputs, embed, run):
        q, expected = torch.empty_like(self.q), torch.empty_like(self.q, dtype=torch.float32)
        caches, wanted = (self.k.clone(), self.v.clone()), (self.k.float(), self.v.float())
        run(caches, q)
        qkv_torch(*inputs, self.state, *wanted, expected, eps=EPS, embed=embed)
        close(q, expected, bound(q.dtype))
        for cache, want in zip(caches, wanted, strict=True):
            written = ~torch.isnan(want)
            assert torch.equal(torch.isnan(cache), ~written)
            close(cache[written], want[written], bound(q.dtype))


def check_streams(close, actual, exact, multiple, count=3):
    close(actual.residual[:count], exact.residual[:count], multiple)
    close(actual.scaled[:count], exact.scaled[:count], multiple + 1)
    squares = [stream.squares[: stream.parts, :count].sum(0) for stream in (actual, exact)]
    wide = actual.residual[:count].float().square().sum(-1)  # the squares of what was stored
    assert torch.allclose(squares[0], wide, rtol=1e-5) and torch.allclose(*squares, rtol=0.02)


@pytest.fixture
def case(device, dtype):
    return Case(dtype, device)


def bound(dtype):
    """Roundings allowed: of x times the norm's gain, of the result, and of sums of about a hundred terms."""
    return 24 if dtype == torch.float32 else 4


@pytest.mark.parametrize("embed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_qkv(case, dtype, close, embed, bias):
    inputs = (case.embed if embed else case.x, case.gain, case.w_qkv, case.bias if bias else None, case.cos_sin, case.rows)
    case.check_qkv(close, inputs, embed, lambda caches, q: qkv(
        *inputs, case.state, *caches, q, eps=EPS, tiles=ROWS, embed=embed, pdl=case.pdl))  # fmt: skip


@pytest.mark.parametrize("tiles", TILES, ids=IDS)
@pytest.mark.parametrize("bias", [False, True])
def test_qkv_in_tiles(case, dtype, close, tiles, bias):
    inputs = (case.x, case.gain, case.w_qkv, case.bias if bias else None, case.cos_sin, case.rows)
    case.check_qkv(close, inputs, False, lambda caches, q: qkv_tiles(
        case.stream(case.x), case.w_qkv, inputs[3], case.cos_sin, case.rows, case.state, *caches, q, eps=EPS, tiles=tiles,
        pdl=case.pdl, space=case.space))  # fmt: skip
    assert (case.space.arrived == 0).all()


@pytest.mark.skipif(not GPU, reason="Gluon has no interpreter")
@pytest.mark.parametrize("tiles", [RegisterTiles(16, 32, 2, 1), RegisterTiles(32, 32, 1, 4), RegisterTiles(16, 32, 2, 2)])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_products_in_registers(device, close, kind, tiles):
    dtype, case = kind, Case(kind, device, hidden=128)
    for bias in (None, case.bias):
        inputs = (case.x, case.gain, case.w_qkv, bias, case.cos_sin, case.rows)
        case.check_qkv(close, inputs, False, lambda caches, q, bias=bias: qkv_tiles(
            case.stream(case.x), case.w_qkv, bias, case.cos_sin, case.rows, case.state, *caches, q, eps=EPS, tiles=tiles,
            pdl=case.pdl, space=case.space))  # fmt: skip
    x, streams = case.q.flatten(1), [case.stream(case.x), case.stream(case.x, torch.float32)]
    project_tiles(x, case.w_o, case.gain, streams[0], tiles=tiles, pdl=case.pdl, space=case.space)
    project_tiles_torch(x, case.w_o, case.gain, streams[1])
    check_streams(close, *streams, bound(dtype))
    out = torch.empty(3, case.inner, dtype=dtype, device=device)
    expected = torch.empty_like(out, dtype=torch.float32)
    gate_up_tiles(case.stream(case.x), case.w_gate_up, out, eps=EPS, tiles=tiles, pdl=case.pdl, space=case.space)
    gate_up_torch(case.x, case.gain, case.w_gate_up, expected, eps=EPS)
    close(out, expected, bound(dtype))
    logits, exact = (torch.empty(3, VOCAB, device=device) for _ in range(2))
    head_tiles(case.stream(case.x), case.w_head, logits, eps=EPS, tiles=replace(tiles, rows=16), pdl=case.pdl)
    head_torch(case.x, case.gain, case.w_head, exact, eps=EPS)
    assert (logits - exact).abs().max() <= bound(dtype) * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.skipif(not GPU or torch.cuda.get_device_capability()[0] != 9, reason="wgmma is Hopper's")
@pytest.mark.parametrize("tiles", [StreamTiles(64, 1, 4, 2), StreamTiles(64, 4, 4, 1), StreamTiles(64, 2, 4, 1, 128),
                                   StreamTiles(64, 1, 4, 1, 256)])
@pytest.mark.parametrize("count", [3, 20, 128])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_products_in_a_stream(device, close, kind, count, tiles):
    """Batches whose rows are three rows over and over: slots then write the same key twice, with the same bits."""
    dtype, case = kind, Case(kind, device, hidden=256, heads=4, dim=64, inner=256)
    tiles = replace(tiles, warps=8 if count > 64 else 4)
    again = torch.arange(count, device=device) % 3
    for bias in (None, case.bias):
        rows = case.rows[again]
        q = torch.empty(count, *case.q.shape[1:], dtype=dtype, device=device)
        expected = torch.empty(3, *case.q.shape[1:], device=device)
        caches, wanted = (case.k.clone(), case.v.clone()), (case.k.float(), case.v.float())
        qkv_tiles(case.stream(case.x[again]), case.w_qkv, bias, case.cos_sin, rows, case.state, *caches, q, eps=EPS,
                  tiles=tiles, pdl=case.pdl, space=case.space)  # fmt: skip
        inputs = (case.x, case.gain, case.w_qkv, bias, case.cos_sin, case.rows)
        qkv_torch(*inputs, case.state, *wanted, expected, eps=EPS, embed=False)
        close(q, expected[again], bound(dtype))
        for cache, want in zip(caches, wanted, strict=True):
            written = ~torch.isnan(want)
            assert torch.equal(torch.isnan(cache), ~written)
            close(cache[written], want[written], bound(dtype))
    x = case.q.flatten(1)[again]
    streams = [case.stream(case.x[again]), case.stream(case.x[again], torch.float32)]
    project_tiles(x, case.w_o, case.gain, streams[0], tiles=tiles, pdl=case.pdl, space=case.space)
    project_tiles_torch(x, case.w_o, case.gain, streams[1])
    check_streams(close, *streams, bound(dtype), count)
    out = torch.empty(count, case.inner, dtype=dtype, device=device)
    expected = torch.empty_like(out, dtype=torch.float32)
    gate_up_torch(case.x[again], case.gain, case.w_gate_up, expected, eps=EPS)
    for rows_of_half in (64, 32):
        gate_up_tiles(case.stream(case.x[again]), case.w_gate_up, out, eps=EPS, pdl=case.pdl, space=case.space,
                      tiles=replace(tiles, rows=rows_of_half))  # fmt: skip
        close(out, expected, bound(dtype))
    logits, exact = (torch.empty(count, 256, device=device) for _ in range(2))
    head_tiles(case.stream(case.x[again]), case.w_head[:256], logits, eps=EPS, tiles=replace(tiles, splits=1), pdl=case.pdl)
    head_torch(case.x[again], case.gain, case.w_head[:256], exact, eps=EPS)
    assert (logits - exact).abs().max() <= bound(dtype) * torch.finfo(dtype).eps * exact.abs().max()
    assert (case.space.arrived == 0).all()


@pytest.mark.parametrize("bias", [False, True])
def test_qkv_by_the_library(case, close, bias):
    inputs = (case.x, case.gain, case.w_qkv, case.bias if bias else None, case.cos_sin, case.rows)
    product = torch.empty(3, len(case.w_qkv), dtype=case.x.dtype, device=case.x.device)
    case.check_qkv(close, inputs, False, lambda caches, q: qkv_library(
        case.stream(case.x), case.w_qkv, inputs[3], case.cos_sin, case.rows, case.state, *caches, product, q, eps=EPS,
        pdl=case.pdl))  # fmt: skip


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("tiles", [SplitTiles(64, 16, 4, 1), SplitTiles(32, 32, 2, 2), SplitTiles(64, 16, 4, 1, 32),
                                   SplitTiles(256, 16, 4, 1, 256)],
                         ids=["64", "32", "early", "all early"])
@pytest.mark.parametrize("heads,kv_heads", [(4, 2), (3, 3), (8, 1)])
def test_attention(device, dtype, close, window, tiles, heads, kv_heads):
    case = Case(dtype, device, heads=heads, kv_heads=kv_heads)
    space = SplitSpace.empty(3, heads, kv_heads, case.dim, device)
    out, expected = torch.empty_like(case.q), torch.empty_like(case.q, dtype=torch.float32)
    inputs = (case.q, case.k, case.v)
    for _ in range(2):  # the second finds the counters as the first left them
        attention(*inputs, out, case.rows, case.state, space, scale=0.2, window=window, longest=256, tiles=tiles, pdl=case.pdl)
        attention_torch(*inputs, expected, case.rows, case.state, scale=0.2, window=window)
        close(out, expected, 60 if dtype == torch.float32 else 4, 1.0)
        assert (space.arrived == 0).all()


@pytest.mark.skipif(not GPU or torch.cuda.get_device_capability()[0] != 9, reason="what is chosen on a Hopper")
@pytest.mark.parametrize("heads,kv_heads,dim", [(8, 1, 64), (2, 2, 128), (8, 2, 128)])
def test_attention_as_it_is_divided(device, close, heads, kv_heads, dim):
    """By every division that calibration may choose for these heads, also contexts that are near its edges."""
    configs = [SimpleNamespace(head_dim=dim, num_kv_heads=count) for count in (8, 32)]
    chosen = {tiles for config in configs for rows in (1, 8, 16, 32, 64, 256) for of in (attention_candidates, far_candidates)
              for tiles in of(config, rows)}  # fmt: skip
    assert len(chosen) > 8
    case = Case(torch.bfloat16, device, heads=heads, kv_heads=kv_heads, dim=dim)
    space = SplitSpace.empty(3, heads, kv_heads, dim, device)
    for contexts in ([0, 31, 200], [511, 63, 15], [16, 64, 128]):
        case.state.position[:3] = torch.tensor(contexts)
        case.fill()
        expected = torch.empty_like(case.q, dtype=torch.float32)
        attention_torch(case.q, case.k, case.v, expected, case.rows, case.state, scale=dim**-0.5, window=None)
        for tiles in chosen:
            out = torch.empty_like(case.q)
            attention(case.q, case.k, case.v, out, case.rows, case.state, space, scale=dim**-0.5, window=None, longest=CONTEXT,
                      tiles=tiles, pdl=case.pdl)  # fmt: skip
            close(out, expected, 4, 1.0)


def test_attention_over_more_keys_than_the_splits_hold(device, dtype, close):
    case = Case(dtype, device)
    case.state.position[:3] = torch.tensor([500, 16 * 32 - 2, 100])
    case.fill()
    space = SplitSpace.empty(3, case.heads, case.kv_heads, case.dim, device)
    out, expected = torch.empty_like(case.q), torch.empty_like(case.q, dtype=torch.float32)
    tiles = SplitTiles(16, 16, 4, 1, 16)
    attention(case.q, case.k, case.v, out, case.rows, case.state, space, scale=0.2, window=None, longest=CONTEXT, tiles=tiles,
              pdl=case.pdl)  # fmt: skip
    attention_torch(case.q, case.k, case.v, expected, case.rows, case.state, scale=0.2, window=None)
    close(out, expected, 60 if dtype == torch.float32 else 4, 1.0)


@pytest.mark.parametrize("embed", [False, True])
def test_project(case, dtype, close, embed):
    x = case.q.flatten(1)
    out = torch.randn(3, case.hidden, device=x.device).to(dtype)
    expected = torch.empty_like(out, dtype=torch.float32)
    project_torch(x, case.w_o, case.embed if embed else out, expected, case.rows, case.state.last_token, embed=embed)
    project(x, case.w_o, case.embed if embed else out, out, case.rows, case.state.last_token, tiles=ROWS, embed=embed,
            pdl=case.pdl)  # fmt: skip
    close(out, expected, bound(dtype))


@pytest.mark.parametrize("tiles", TILES, ids=IDS)
def test_project_in_tiles(case, dtype, close, tiles):
    x, streams = case.q.flatten(1), [case.stream(case.x), case.stream(case.x, torch.float32)]
    project_tiles(x, case.w_o, case.gain, streams[0], tiles=tiles, pdl=case.pdl, space=case.space)
    project_tiles_torch(x, case.w_o, case.gain, streams[1])
    check_streams(close, *streams, bound(dtype))
    assert (case.space.arrived == 0).all()


def test_project_by_the_library(case, dtype, close):
    x, streams = case.q.flatten(1), [case.stream(case.x), case.stream(case.x, torch.float32)]
    project_library(x, case.w_o, case.gain, streams[0], torch.empty_like(case.x), pdl=case.pdl)
    project_tiles_torch(x, case.w_o, case.gain, streams[1])
    check_streams(close, *streams, bound(dtype))


def test_embed(case, dtype, close):
    streams = [case.stream(case.x), case.stream(case.x, torch.float32)]
    embed(case.embed, case.gain, case.rows, case.state.last_token, streams[0], pdl=case.pdl)
    embed_torch(case.embed, case.gain, case.rows, case.state.last_token, streams[1])
    check_streams(close, *streams, 1)


def test_gate_up(case, dtype, close):
    out = torch.empty(3, case.inner, dtype=dtype, device=case.x.device)
    expected = torch.empty_like(out, dtype=torch.float32)
    gate_up(case.x, case.gain, case.w_gate_up, out, eps=EPS, tiles=ROWS, pdl=case.pdl)
    gate_up_torch(case.x, case.gain, case.w_gate_up, expected, eps=EPS)
    close(out, expected, bound(dtype))


@pytest.mark.parametrize("tiles", TILES, ids=IDS)
def test_gate_up_in_tiles(case, dtype, close, tiles):
    out = torch.empty(3, case.inner, dtype=dtype, device=case.x.device)
    expected = torch.empty_like(out, dtype=torch.float32)
    gate_up_tiles(case.stream(case.x), case.w_gate_up, out, eps=EPS, tiles=tiles, pdl=case.pdl, space=case.space)
    gate_up_torch(case.x, case.gain, case.w_gate_up, expected, eps=EPS)
    close(out, expected, bound(dtype))


def test_gate_up_by_the_library(case, dtype, close):
    out = torch.empty(3, case.inner, dtype=dtype, device=case.x.device)
    expected = torch.empty_like(out, dtype=torch.float32)
    product = torch.empty(3, 2 * case.inner, dtype=dtype, device=case.x.device)
    gate_up_library(case.stream(case.x), case.w_gate_up, product, out, eps=EPS, pdl=case.pdl)
    gate_up_torch(case.x, case.gain, case.w_gate_up, expected, eps=EPS)
    close(out, expected, bound(dtype))


@pytest.mark.parametrize("tiles", [ROWS, *(tiles for tiles in TILES if tiles.splits == 1), "library"])
def test_head(case, dtype, tiles):
    logits = torch.empty(3, VOCAB, device=case.x.device)
    expected = torch.empty_like(logits)
    if tiles == "library":
        if not (GPU or dtype == torch.float32):
            pytest.skip("torch has no product of 16-bit numbers into float32 on a CPU")
        head_library(case.stream(case.x), case.w_head, torch.empty_like(case.x), logits, eps=EPS, pdl=case.pdl)
    elif isinstance(tiles, RowTiles):
        head(case.x, case.gain, case.w_head, logits, eps=EPS, tiles=tiles, pdl=case.pdl)
    else:
        head_tiles(case.stream(case.x), case.w_head, logits, eps=EPS, tiles=tiles, pdl=case.pdl)
    head_torch(case.x, case.gain, case.w_head, expected, eps=EPS)
    assert (logits - expected).abs().max() <= bound(dtype) * torch.finfo(dtype).eps * expected.abs().max()


def test_sample(device):
    case = Case(torch.float32, device)
    logits = torch.randn(3, VOCAB, device=device) * 3
    logits[1, 7] = logits[1, 200] = 50.0  # equals: the lowest id wins
    states = [own_chosen(copy.deepcopy(case.state)) for _ in range(2)]
    space = SampleSpace(3, device)
    for broken in (False, True):
        if broken:
            logits[0, 5] = float("nan")
        sample(logits, case.rows, states[0], space, pdl=case.pdl)
        sample_torch(logits, case.rows, states[1], space)
        assert torch.equal(*(chosen(state, case.rows) for state in states))
        assert torch.equal(states[0].last_token, states[1].last_token)
        assert torch.equal(states[0].position, states[1].position)
        assert (space.arrived == 0).all()
    assert chosen(states[0], case.rows)[:2].tolist() == [-1, 7]


def test_what_is_not_ruled_is_not_cut(device):
    """Whatever another step has left as its rows' thresholds."""
    case, logits = Case(torch.float32, device), torch.randn(3, VOCAB, device=device)
    space = SampleSpace(3, device)
    space.limit.fill_(100.0)
    state = own_chosen(copy.deepcopy(case.state))
    sample(logits, case.rows, state, space, pdl=case.pdl, ruled=False)
    sample_torch(logits, case.rows, case.state, SampleSpace(3, device))
    assert chosen(state, case.rows).equal(chosen(case.state, case.rows))
    sample(logits, case.rows, case.state, space, pdl=case.pdl)
    assert not chosen(case.state, case.rows).equal(chosen(state, case.rows)), "thresholds are looked at"


def test_padding_rows_do_not_move_the_dump_slot(device):
    case = Case(torch.float32, device)
    rows = torch.tensor([0, case.state.dump, case.state.dump], device=device)
    before = case.state.position.clone()
    sample(torch.randn(3, VOCAB, device=device), rows, case.state, SampleSpace(3, device), pdl=case.pdl)
    assert (case.state.position - before).tolist() == [1, 0, 0, 0, 0]
    assert case.state.last_token[case.state.dump] == 0 and not case.state.chosen[case.state.dump].any()
