"""Decode attention once more, in Gluon: the warps of a program share out the keys, so that only the end is common to them.

The same contract as attention.py, which is its reference: one program per (KV head, split, row). Each warp has an online
softmax of its own over `turn` keys a turn (a batch dimension laid over the warps); they are put together once. Keys go straight
from their page into the fragments of the tensor cores; those of the first turn, all but the newest token's, before the
launch's wait: they were written by earlier steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from model_core.kernels.runtime import gl, gluon_jit, triton

if triton is not None and gl.constexpr is not int:
    from triton.experimental.gluon.language.nvidia.ampere import mma_v2


@dataclass(frozen=True)
class WarpTiles:
    """split: keys per program, doubled and more where a context would need over MAX_SPLITS; turn: keys per warp and turn."""

    split: int
    turn: int
    warps: int

    @property
    def keys(self) -> int:
        """Keys that all warps take in one turn."""
        return self.turn * self.warps

    def fits(self, group: int, dim: int) -> bool:
        """Whether the kernel takes `group` query heads per KV head of `dim` components."""
        return group <= 16 and dim in (32, 64, 128)


@gluon_jit
def _read(
    cache_ptr, slot, table_ptr, table_row, pos, mask, column, page_stride, slot_stride, PAGE: gl.constexpr, AXIS: gl.constexpr
):
    """Cache rows of positions pos [W, T] where mask, zeros elsewhere, with `column` along a new AXIS.

    Pages are looked up in two dimensions: in three every thread would look up each of them D / 4 times.
    """
    page = gl.load(table_ptr + slot * table_row + pos // PAGE, mask=mask, other=0).to(gl.int64)
    at = gl.expand_dims(page * page_stride + (pos % PAGE) * slot_stride, AXIS)
    return gl.load(cache_ptr + at + column, mask=gl.expand_dims(mask, AXIS), other=0.0)


@gluon_jit
def _positions(begin, T: gl.constexpr, W: gl.constexpr, L: gl.constexpr):
    """[W, T] in layout L: warp w takes positions begin + w T .. of every turn."""
    warp = gl.arange(0, W, layout=gl.SliceLayout(1, L))[:, None]
    return begin + warp * T + gl.arange(0, T, layout=gl.SliceLayout(0, L))[None, :]


@gluon_jit
def kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, part_ptr, stat_ptr, arrived_ptr, rows_ptr, position_ptr, table_ptr, qk_scale,
    table_row, k_page, k_slot, k_head, v_page, v_slot, v_head,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, D: gl.constexpr, PAGE: gl.constexpr, SPLIT: gl.constexpr,
    SPLITS: gl.constexpr, T: gl.constexpr, W: gl.constexpr, WINDOW: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    GROUP: gl.constexpr = HEADS // KV_HEADS
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 8)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 8)
    P: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    VB: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    V: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 256 // D, D // 8], [W, 1, 1], [2, 1, 0])
    O: gl.constexpr = gl.SliceLayout(0, MMA)  # noqa: E741
    if PDL:
        gl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    kv_head, split, row = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    slot = gl.load(rows_ptr + row)
    context = gl.load(position_ptr + slot) + 1
    lowest = context * 0
    if WINDOW > 0:
        lowest = gl.maximum(context - WINDOW, 0)
    first = lowest // (W * T) * (W * T)
    size = SPLIT * gl.cdiv(context - first, SPLIT * SPLITS)
    used = gl.cdiv(context - first, size)
    begin = first + split * size
    end = gl.minimum(begin + size, context)
    k_ptr += kv_head * k_head
    v_ptr += kv_head * v_head

    # keys [W, D, T], values [W, T, D]
    k_at = _positions(begin, T, W, gl.SliceLayout(1, B))
    v_at = _positions(begin, T, W, gl.SliceLayout(2, V))
    s_at = _positions(begin, T, W, gl.SliceLayout(1, MMA))
    k_d = gl.arange(0, D, layout=gl.SliceLayout(0, gl.SliceLayout(2, B)))[None, :, None]
    v_d = gl.arange(0, D, layout=gl.SliceLayout(0, gl.SliceLayout(1, V)))[None, None, :]
    newest = context - 1
    old = (k_at >= lowest) & (k_at < end) & (k_at < newest)
    k = _read(k_ptr, slot, table_ptr, table_row, k_at, old, k_d, k_page, k_slot, PAGE, 1)
    old_v = (v_at >= lowest) & (v_at < end) & (v_at < newest)
    v = _read(v_ptr, slot, table_ptr, table_row, v_at, old_v, v_d, v_page, v_slot, PAGE, 2)
    if PDL:
        gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    if split < used:
        g = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, A)))[None, :, None]
        d = gl.arange(0, D, layout=gl.SliceLayout(0, gl.SliceLayout(1, A)))[None, None, :]
        every = gl.arange(0, W, layout=gl.SliceLayout(1, gl.SliceLayout(2, A)))[:, None, None] * 0
        q = gl.load(q_ptr + (row * HEADS + kv_head * GROUP + g) * D + d + every, mask=(g + every < GROUP), other=0.0)
        # the newest token, if it is one of the first turn's
        new = (k_at == newest) & (k_at < end)
        new_k = _read(k_ptr, slot, table_ptr, table_row, k_at, new, k_d, k_page, k_slot, PAGE, 1)
        k = gl.where(gl.expand_dims(new, 1), new_k, k)
        new_2 = (v_at == newest) & (v_at < end)
        new_v = _read(v_ptr, slot, table_ptr, table_row, v_at, new_2, v_d, v_page, v_slot, PAGE, 2)
        v = gl.where(gl.expand_dims(new_2, 2), new_v, v)

        top = gl.full([W, 16], float("-inf"), gl.float32, layout=gl.SliceLayout(2, MMA))
        norm = gl.zeros([W, 16], gl.float32, layout=gl.SliceLayout(2, MMA))
        acc = gl.zeros([W, 16, D], gl.float32, layout=MMA)
        for _ in range(begin, end, W * T):
            here, value = k, v
            k_at += W * T
            v_at += W * T
            k = _read(k_ptr, slot, table_ptr, table_row, k_at, (k_at >= lowest) & (k_at < end), k_d, k_page, k_slot, PAGE, 1)
            v = _read(v_ptr, slot, table_ptr, table_row, v_at, (v_at >= lowest) & (v_at < end), v_d, v_page, v_slot, PAGE, 2)
            scores = mma_v2(q, here, gl.zeros([W, 16, T], gl.float32, layout=MMA))
            seen = gl.expand_dims((s_at >= lowest) & (s_at < end), 1)
            s_at += W * T
            scores = gl.where(seen, scores, float("-inf"))
            new_top = gl.maximum(top, gl.max(scores, axis=2))
            base = gl.where(new_top == float("-inf"), 0.0, new_top)
            weights = gl.exp2((scores - base[:, :, None]) * qk_scale)
            shrink = gl.exp2((top - base) * qk_scale)
            norm = norm * shrink + gl.sum(weights, axis=2)
            weights = gl.convert_layout(weights.to(value.dtype), P)
            acc = mma_v2(weights, gl.convert_layout(value, VB), acc * shrink[:, :, None])
            top = new_top

        best = gl.max(top, axis=0)
        safe = gl.where(best == float("-inf"), 0.0, best)
        share = gl.exp2((top - safe[None, :]) * qk_scale)
        acc = gl.sum(acc * share[:, :, None], axis=0)
        best = gl.convert_layout(best, gl.SliceLayout(1, O))
        norm = gl.convert_layout(gl.sum(norm * share, axis=0), gl.SliceLayout(1, O))
        g = gl.arange(0, 16, layout=gl.SliceLayout(1, O))
        d = gl.arange(0, D, layout=gl.SliceLayout(0, O))
        inside = g[:, None] * D + d[None, :]
        mask = (g < GROUP)[:, None] & (d < D)[None, :]
        out_at = out_ptr + (row * HEADS + kv_head * GROUP) * D + inside
        if used == 1:
            gl.store(out_at, (acc / norm[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
        else:
            pair = row * KV_HEADS + kv_head
            part_ptr += (pair * SPLITS).to(gl.int64) * (GROUP * D)
            stat_ptr += pair * SPLITS * GROUP * 2
            gl.store(part_ptr + split * GROUP * D + inside, acc, mask=mask)
            gl.store(stat_ptr + (split * GROUP + g) * 2, best, mask=g < GROUP)
            gl.store(stat_ptr + (split * GROUP + g) * 2 + 1, norm, mask=g < GROUP)
            gl.thread_barrier()  # all stores before the arrival
            if gl.atomic_add(arrived_ptr + pair, 1, sem="acq_rel") == used - 1:
                gl.thread_barrier()
                S: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [W, 1], [1, 0])
                s = gl.arange(0, SPLITS, layout=gl.SliceLayout(1, S))
                h = gl.arange(0, 16, layout=gl.SliceLayout(0, S))
                stat_at = stat_ptr + (s[:, None] * GROUP + h[None, :]) * 2
                present = (s < used)[:, None] & (h < GROUP)[None, :]
                tops = gl.load(stat_at, mask=present, other=float("-inf"), cache_modifier=".cg")
                norms = gl.load(stat_at + 1, mask=present, other=0.0, cache_modifier=".cg")
                high = gl.max(tops, axis=0)
                high = gl.where(high == float("-inf"), 0.0, high)
                total = gl.sum(norms * gl.exp2((tops - high[None, :]) * qk_scale), axis=0)
                total = gl.convert_layout(total, gl.SliceLayout(1, O))
                high = gl.convert_layout(high, gl.SliceLayout(1, O))
                acc = gl.zeros([16, D], gl.float32, layout=O)
                for at_split in range(0, used, 4):
                    for lane in gl.static_range(4):  # four parts are on their way at once
                        other = at_split + lane
                        there = (g < GROUP) & (other < used)
                        weight = gl.exp2((gl.load(stat_ptr + (other * GROUP + g) * 2, mask=there, other=float("-inf"),
                                                  cache_modifier=".cg") - high) * qk_scale)  # fmt: skip
                        acc += weight[:, None] * gl.load(part_ptr + other * GROUP * D + inside, mask=mask & (other < used),
                                                         other=0.0, cache_modifier=".cg")  # fmt: skip
                gl.store(out_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
                gl.store(arrived_ptr + pair, 0)  # ready for the next layer and the next replay
