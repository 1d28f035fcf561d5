"""What follows a product in the Gluon kernels (registers.py, streaming.py), for one tile [rows of W, rows of x] in float32.

E is the tile's layout; n or d counts along its first dimension, m along its second. What an epilogue needs from memory is
asked for before the product, where it arrives meanwhile.
"""

from __future__ import annotations

from model_core.kernels.runtime import gl, gluon_jit


@gluon_jit
def follow(PDL: gl.constexpr):
    """products.follow, in Gluon."""
    if PDL:
        gl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
        gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon_jit
def squares_of(
    squares_ptr, m, M, PARTS: gl.constexpr, ROWS: gl.constexpr, ALL: gl.constexpr, E: gl.constexpr
):  # fmt: skip
    """The sums of squares of rows m of the stream, [ALL >= PARTS, BM]: asked for before a product, added up behind it."""
    part = gl.arange(0, ALL, layout=gl.SliceLayout(1, E))
    at = squares_ptr + part[:, None] * ROWS + m[None, :]
    return gl.load(at, mask=(part < PARTS)[:, None] & (m < M)[None, :], other=0.0)


@gluon_jit
def norm_factor(squares, eps, H: gl.constexpr):
    """1 / rms [1, BM] from the sums of squares."""
    return gl.rsqrt(gl.sum(squares, axis=0) / H + eps)[None, :]


@gluon_jit
def finish_project(
    acc, base, gain, n, m, part, residual_ptr, scaled_ptr, squares_ptr, M, N: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Add columns n of a product to those of the stream's residual, `base`; part: number of these columns."""
    present = (m < M)[None, :]
    at = m[None, :] * N + n[:, None]
    rounded = (base.to(gl.float32) + acc).to(residual_ptr.dtype.element_ty)
    wide = gl.where(present, rounded.to(gl.float32), 0.0)
    gl.store(residual_ptr + at, rounded, mask=present)
    gl.store(scaled_ptr + at, (wide * gain.to(gl.float32)[:, None]).to(scaled_ptr.dtype.element_ty), mask=present)
    gl.store(squares_ptr + part * ROWS + m, gl.sum(wide * wide, axis=0), mask=m < M)


@gluon_jit
def finish_gate_up(gate, up, squares, n, m, out_ptr, eps, M, INNER: gl.constexpr, K: gl.constexpr):
    """silu(gate) * up of columns n, both still to be divided by rms."""
    factor = norm_factor(squares, eps, K)
    gate = gate * factor
    value = gate / (1.0 + gl.exp(-gate)) * (up * factor)
    gl.store(out_ptr + m[None, :] * INNER + n[:, None], value.to(out_ptr.dtype.element_ty), mask=(m < M)[None, :])


@gluon_jit
def finish_head(acc, squares, n, m, out_ptr, eps, M, N: gl.constexpr, K: gl.constexpr):
    """Logits n, still to be divided by rms."""
    at = out_ptr + m.to(gl.int64)[None, :] * N + n[:, None]
    gl.store(at, acc * norm_factor(squares, eps, K), mask=(m < M)[None, :])


@gluon_jit
def place(
    d, m, head, M, cos_sin_ptr, rows_ptr, position_ptr, table_ptr, table_row,
    D: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """(page, offset) [1, BM] of the rows' new tokens, and cos and sin [P, BM] of their positions for pairs d [P]. Nothing of it
    was written by this chain: it may be read before the launch's wait."""
    slot = gl.load(rows_ptr + m, mask=m < M, other=0)
    position = gl.load(position_ptr + slot, mask=m < M, other=0)
    page = gl.load(table_ptr + slot * table_row + position // PAGE, mask=m < M, other=0).to(gl.int64)
    turned = (m < M)[None, :] & (head < HEADS + KV_HEADS)
    at = cos_sin_ptr + position[None, :] * D + d[:, None]
    cos = gl.load(at, mask=turned, other=1.0)
    sin = gl.load(at + D // 2, mask=turned, other=0.0)
    return page[None, :], (position % PAGE)[None, :], cos, sin


@gluon_jit
def finish_qkv(
    a, b, squares, bias_a, bias_b, page, offset, cos, sin, d, m, head, q_ptr, k_ptr, v_ptr,
    eps, k_page, k_slot, k_head, v_page, v_slot, v_head, M,
    K: gl.constexpr, D: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """Rotate the halves (a, b) of pairs d of one head, still to be divided by rms, and store them where they belong."""
    factor = norm_factor(squares, eps, K)
    a = a * factor
    b = b * factor
    if BIAS:
        a += bias_a.to(gl.float32)[:, None]
        b += bias_b.to(gl.float32)[:, None]
    low = (a * cos - b * sin).to(q_ptr.dtype.element_ty)
    high = (b * cos + a * sin).to(q_ptr.dtype.element_ty)
    present = (m < M)[None, :]
    if head < HEADS:
        at = q_ptr + (m[None, :] * HEADS + head) * D + d[:, None]
        gl.store(at, low, mask=present)
        gl.store(at + D // 2, high, mask=present)
    elif head < HEADS + KV_HEADS:
        at = k_ptr + page * k_page + offset * k_slot + (head - HEADS) * k_head + d[:, None]
        gl.store(at, low, mask=present)
        gl.store(at + D // 2, high, mask=present)
    else:
        at = v_ptr + page * v_page + offset * v_slot + (head - HEADS - KV_HEADS) * v_head + d[:, None]
        gl.store(at, low, mask=present)
        gl.store(at + D // 2, high, mask=present)
