"""Counter-based random numbers: the noise of a token depends on (seed, position) alone, never on its batch mates."""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF


def uniform(seeds: torch.Tensor, positions: torch.Tensor, count: int) -> torch.Tensor:
    """Uniform floats in (0, 1) by Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

    Args:
        seeds: int64 [R], the 64-bit key of each row.
        positions: int64 [R], the position of the token that is being chosen.
        count: numbers per row (the vocabulary size).

    Returns:
        float32 [R, count]; element j comes from word j % 4 of counter (j // 4, 0, position, 0), so that a kernel can
        produce any element by itself.
    """
    blocks = torch.arange((count + 3) // 4, device=seeds.device)
    c0 = blocks.expand(seeds.shape[0], -1)
    c1 = torch.zeros_like(c0)
    c2 = (positions & _MASK)[:, None].expand_as(c0)
    c3 = c1
    k0, k1 = (seeds & _MASK)[:, None], ((seeds >> 32) & _MASK)[:, None]
    for _ in range(10):
        # int64 products wrap modulo 2**64; masking both halves gives the unsigned 32 x 32 -> 64 bit product.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK,
        )  # fmt: skip
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    words = torch.stack((c0, c1, c2, c3), dim=-1).flatten(1)[:, :count]
    # 23 bits and the half: every value is exact in float32 and neither 0 nor 1 can come out.
    return ((words >> 9).to(torch.float32) + 0.5) * (1.0 / (1 << 23))
