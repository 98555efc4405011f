"""The random state of torch: set to that of a place in the model, and back to the script's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hvdscale.model.seeds import seed_of

__all__ = ["apart", "reseed", "set_state", "state_of"]


def _generators() -> tuple[torch.Generator, ...]:
    """What layers draw from: the CPU's, and those of the GPUs once they are in use."""
    return (torch.default_generator, *(torch.cuda.default_generators if torch.cuda.is_initialized() else ()))


@contextmanager
def apart() -> Iterator[None]:
    """The global random state comes back afterwards."""
    states = [(generator, generator.get_state()) for generator in _generators()]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def reseed(*place: int) -> None:
    """Set the global random state to that of ``place``: (seed, what, numbers ...)."""
    seed = seed_of(*place)
    for generator in _generators():
        generator.manual_seed(seed)


def state_of(model: nn.Module) -> torch.Tensor:
    """The random state that the layers of ``model`` draw from, uint8[n]: the CPU's and that of its GPU."""
    return torch.cat([generator.get_state() for generator in _of(model)])


def set_state(model: nn.Module, state: torch.Tensor) -> None:
    """Go on from the random state that ``state_of`` gave."""
    at = 0
    for generator in _of(model):
        size = generator.get_state().numel()
        generator.set_state(state[at : at + size])
        at += size


def _of(model: nn.Module) -> list[torch.Generator]:
    device = next((p.device for p in model.parameters() if p.is_cuda), None)
    if device is None:
        return [torch.default_generator]
    index = torch.cuda.current_device() if device.index is None else device.index
    return [torch.default_generator, torch.cuda.default_generators[index]]
