"""What the sampling kernel told the host."""

import torch

from model_core.kernels.decode.state import RING, DecodeState


def chosen(state: DecodeState, slots: torch.Tensor) -> torch.Tensor:
    """The newest tokens of these slots, or what stands for none."""
    at = (state.position[slots] % RING).cpu()  # waits for the device
    return state.chosen[slots.cpu(), at].to(slots.device)


def own_chosen(state: DecodeState) -> DecodeState:
    """A deep copy's tensors are no pinned memory, which a GPU needs."""
    if state.position.is_cuda:
        state.chosen = state.chosen.clone().pin_memory()
    return state
