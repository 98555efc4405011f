"""The random state of torch: set to that of a place in the model, and back to the script's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hvdscale.model.seeds import seed_of

__all__ = ["apart", "reseed"]


@contextmanager
def apart() -> Iterator[None]:
    """The global random state comes back afterwards."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


def reseed(*place: int) -> None:
    """Set the global random state to that of ``place``: (seed, what, numbers ...)."""
    torch.default_generator.manual_seed(seed_of(*place))
