"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864): the table of angles, exactly as transformers computes it."""

from __future__ import annotations

import math

import torch

from model_core.model.config import ModelConfig, RopeScaling


def cos_sin_table(config: ModelConfig, length: int, device: torch.device | str) -> torch.Tensor:
    """float32 [length, head_dim]: cosines of the head_dim / 2 angles of each position, then their sines.

    Computed on the CPU in float32 whatever the device, so that every machine rotates by the same bits.
    """
    angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse_frequencies(config))
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)


def inverse_frequencies(config: ModelConfig) -> torch.Tensor:
    """float32 [head_dim / 2], radians per position, after the config's scaling."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling)
    return frequencies


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Llama 3.1: waves longer than original / low_freq_factor are stretched, shorter than original / high kept."""
    wavelengths = 2 * math.pi / frequencies
    longest, shortest = scaling.original_context / scaling.low_freq_factor, scaling.original_context / scaling.high_freq_factor
    stretched = torch.where(wavelengths > longest, frequencies / scaling.factor, frequencies)
    blend = (scaling.original_context / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor)
    between = (1 - blend) * stretched / scaling.factor + blend * stretched
    return torch.where((wavelengths >= shortest) & (wavelengths <= longest), between, stretched)
