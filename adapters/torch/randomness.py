"""Random numbers of a pipeline: each unit draws from the state of its own place, step and micro-batch.

So dropout masks depend neither on the number of stages nor on the schedule, a recomputed forward pass draws what the
first one drew, and the random state of the script is left alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

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
    text = ",".join(map(str, place)).encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    torch.default_generator.manual_seed(int.from_bytes(digest, "little") & (2**63 - 1))
