"""GGML block formats to real numbers, in plain torch: the bytes go to the device, and the arithmetic happens there.

Source: the block layouts of ggml (ggml-common.h, ggml-quants.c). Products and sums are taken in float32 in ggml's
order, so on the CPU the result equals `gguf.quants` bit for bit (tests compare). Formats that are rare as files (Q2_K,
Q3_K, Q5_0, Q5_1, IQ4_*) go through that package, in numpy.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

# Elements dequantised at a time: bounds the scratch to 4 MiB a temporary. SmolLM2 to float32 on one CPU core: 0.37 s
# (0.46 s in pieces of 1 MiB, 1.2 s by numpy in `gguf.quants`). A GPU wants fewer, larger launches.
_PIECE = 1 << 20
_DEVICE_PIECE = 1 << 24


def dequantise_into(target: torch.Tensor, raw: np.ndarray, kind: str) -> None:
    """Fill `target` (any float dtype, any device) with the tensor stored as `raw`.

    raw: uint8 [..., bytes of a row], as GGUFFile.raw returns it; kind: the GGML name of the block format. Rows of
    `target` and `raw` correspond. The scratch memory is bounded, whatever the tensor's size.
    """
    columns = target.shape[-1]
    stored = torch.from_numpy(raw.reshape(-1, raw.shape[-1]))
    rows = target.view(-1, columns)
    step = max(1, (_PIECE if target.device.type == "cpu" else _DEVICE_PIECE) // columns)
    for begin in range(0, rows.shape[0], step):
        piece = rows[begin : begin + step]
        piece.copy_(dequantise(stored[begin : begin + step].to(target.device), kind).view(piece.shape))


def dequantise(raw: torch.Tensor, kind: str) -> torch.Tensor:
    """uint8 [rows, bytes of a row] -> [rows, columns] on the same device: float32, but F16, BF16 and F64 as stored."""
    if kind in _STORED:
        return raw.view(_STORED[kind])
    if kind in _BLOCKS:
        block_bytes, decode = _BLOCKS[kind]
        return decode(raw.reshape(-1, block_bytes)).view(raw.shape[0], -1)
    from gguf.constants import GGMLQuantizationType  # half a second, needed by rare files only
    from gguf.quants import dequantize

    return torch.from_numpy(dequantize(raw.cpu().numpy(), GGMLQuantizationType[kind])).to(raw.device)


def _half(blocks: torch.Tensor, offset: int) -> torch.Tensor:
    """The float16 at byte `offset` of every block, as float32 [blocks, 1]."""
    return blocks[:, offset : offset + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [..., n] -> uint8 [..., 2, n]: low halves, then high halves."""
    return torch.stack((packed & 15, packed >> 4), dim=-2)


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _nibbles(blocks[:, 2:]).flatten(1).float().sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _nibbles(blocks[:, 4:]).flatten(1).float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _k_scales(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minima of Q4_K's and Q5_K's 8 sub-blocks, float32 [blocks, 8, 1]: 6-bit integers times halves."""
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat((low & 63, (high & 15) | ((low >> 6) << 4)), dim=1)
    minimum = torch.cat((middle & 63, (high >> 4) | ((middle >> 6) << 4)), dim=1)
    return (scale.float() * _half(blocks, 0)).unsqueeze(2), (minimum.float() * _half(blocks, 2)).unsqueeze(2)


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    scale, minimum = _k_scales(blocks)
    quants = _nibbles(blocks[:, 16:].view(-1, 4, 32)).reshape(-1, 8, 32)
    return quants.float().mul_(scale).sub_(minimum)


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    scale, minimum = _k_scales(blocks)
    quants = _nibbles(blocks[:, 48:].view(-1, 4, 32)).reshape(-1, 8, 32)
    bit = torch.arange(8, dtype=torch.uint8, device=blocks.device).view(8, 1)
    fifth = (blocks[:, 16:48].unsqueeze(1) >> bit) & 1
    return (quants | (fifth << 4)).float().mul_(scale).sub_(minimum)


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    low = _nibbles(blocks[:, :128].view(-1, 2, 64)).view(-1, 2, 4, 32)  # two halves of four runs of 32
    shift = torch.tensor((0, 2, 4, 6), dtype=torch.uint8, device=blocks.device).view(4, 1)
    high = (blocks[:, 128:192].view(-1, 2, 1, 32) >> shift) & 3
    quants = (low | (high << 4)).view(-1, 16, 16)
    scale = blocks[:, 192:208].contiguous().view(torch.int8).float().mul_(_half(blocks, 208)).unsqueeze(2)
    return quants.float().sub_(32).mul_(scale)


_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_BLOCKS: dict[str, tuple[int, Callable[[torch.Tensor], torch.Tensor]]] = {
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q8_0": (34, _q8_0),
    "Q4_K": (144, _q4_k),
    "Q5_K": (176, _q5_k),
    "Q6_K": (210, _q6_k),
}
