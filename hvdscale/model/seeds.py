"""Random numbers of a pipeline: each unit draws from the state of its own place, step and micro-batch.

So dropout masks depend neither on the number of stages nor on the schedule, a recomputed forward pass draws what the
first one drew, and the random state of the script is left alone.
"""

from __future__ import annotations

import hashlib

__all__ = ["seed_of"]


def seed_of(*place: int, bits: int = 63) -> int:
    """A number of so many bits for ``place``: (seed, what, numbers ...)."""
    text = ",".join(map(str, place)).encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "little") & ((1 << bits) - 1)
