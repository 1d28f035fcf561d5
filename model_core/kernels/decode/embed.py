"""The start of a decode step for the tile kernels: the embedding of each row's last token begins its residual stream."""

from __future__ import annotations

import torch

from model_core.kernels.decode.products import follow, launch_options
from model_core.kernels.decode.tiles import Stream, part_width, write_stream
from model_core.kernels.runtime import jit, tl


@jit
def _kernel(
    embed_ptr, gain_ptr, rows_ptr, token_ptr, residual_ptr, scaled_ptr, squares_ptr,
    H: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    part, row = tl.program_id(0), tl.program_id(1)
    n = part * BN + tl.arange(0, BN)
    m = row + tl.arange(0, 1)
    follow(PDL)
    token = tl.load(token_ptr + tl.load(rows_ptr + m))
    value = tl.load(embed_ptr + token[None, :] * H + n[:, None]).to(tl.float32)
    write_stream(value, m, n, part, m >= 0, residual_ptr, scaled_ptr, squares_ptr, gain_ptr, H, ROWS)


def embed(
    table: torch.Tensor, gain: torch.Tensor, rows: torch.Tensor, last_token: torch.Tensor, stream: Stream, *, pdl: bool
) -> None:
    """Rows of the embedding [vocab, H] at the last tokens of slots `rows` [M] begin `stream`; gain [H] of the first norm."""
    hidden = table.shape[1]
    width = part_width(hidden)
    stream.parts = hidden // width
    _kernel[(stream.parts, rows.shape[0])](
        table, gain, rows, last_token, stream.residual, stream.scaled, stream.squares, H=hidden, BN=width, ROWS=stream.rows,
        PDL=pdl, num_warps=2, **launch_options(pdl))  # fmt: skip


def embed_torch(
    table: torch.Tensor, gain: torch.Tensor, rows: torch.Tensor, last_token: torch.Tensor, stream: Stream
) -> None:
    """Reference."""
    write_stream_torch(table[last_token[rows]].float(), gain, stream)


def write_stream_torch(value: torch.Tensor, gain: torch.Tensor, stream: Stream) -> None:
    """Reference of tiles.write_stream: value [M, H] as the whole stream, its squares in one part."""
    rows = value.shape[0]
    stream.residual[:rows] = value
    rounded = stream.residual[:rows].float()
    stream.scaled[:rows] = rounded * gain.float()
    stream.squares[0, :rows] = rounded.square().sum(-1)
    stream.parts = 1


def bytes_moved(rows: int, hidden: int, element_size: int) -> int:
    """A row of the embedding read, residual and scaled written."""
    return 3 * rows * hidden * element_size


def flops(rows: int, hidden: int) -> int:
    return 3 * rows * hidden
