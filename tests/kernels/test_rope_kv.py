import pytest
import torch

from model_core.kernels.rope_kv import rope_kv_write, rope_kv_write_torch

GPU = torch.cuda.is_available()
PAGE, PAGES = 16, 24


def inputs(tokens, heads, kv_heads, dim, dtype, device, head_major):
    fused = torch.randn(tokens, heads + 2 * kv_heads, dim, device=device).to(dtype)
    q, k, v = fused.split((heads, kv_heads, kv_heads), dim=1)  # strided views, as the forward pass has them
    angles = torch.rand(512, dim // 2, device=device) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    positions = torch.randint(0, 512, (tokens,), device=device)
    slots = torch.randperm(PAGE * PAGES, device=device)[:tokens]
    inner = (kv_heads, PAGE) if head_major else (PAGE, kv_heads)
    caches = [torch.full((PAGES, *inner, dim), 7.0, dtype=dtype, device=device) for _ in range(2)]
    k_cache, v_cache = (cache.transpose(1, 2) if head_major else cache for cache in caches)
    return q, k, v, positions, cos_sin, k_cache, v_cache, slots


@pytest.mark.parametrize("tokens,heads,kv_heads,dim", [(1, 9, 3, 64), (3, 4, 4, 80), (17, 8, 1, 32)] + [(200, 32, 4, 64)] * GPU)
@pytest.mark.parametrize("head_major", [False, True])
@pytest.mark.parametrize("op", [rope_kv_write, rope_kv_write_torch])
def test_against_float64(device, dtype, close, op, tokens, heads, kv_heads, dim, head_major):
    q, k, v, positions, cos_sin, k_cache, v_cache, slots = inputs(tokens, heads, kv_heads, dim, dtype, device, head_major)
    cos, sin = cos_sin[positions].double().unsqueeze(1).chunk(2, -1)

    def turned(x):
        first, second = x.double().chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    expected_q, expected_k, kept = turned(q), turned(k), k.clone()
    op(q, k, v, positions, cos_sin, k_cache, v_cache, slots)
    close(q, expected_q, 2)
    close(k_cache[slots // PAGE, slots % PAGE], expected_k, 2)
    assert torch.equal(v_cache[slots // PAGE, slots % PAGE], v)
    assert torch.equal(k, kept)
    untouched = torch.ones(PAGES, PAGE, dtype=torch.bool, device=device)
    untouched[slots // PAGE, slots % PAGE] = False
    assert (k_cache[untouched] == 7).all() and (v_cache[untouched] == 7).all()


def test_no_tokens_is_no_launch(device):
    q, k, v, positions, cos_sin, k_cache, v_cache, slots = inputs(0, 4, 2, 32, torch.float32, device, False)
    rope_kv_write(q, k, v, positions, cos_sin, k_cache, v_cache, slots)
    assert (k_cache == 7).all()
