"""Proof that an epoch was read exactly once: sums of hashed sample numbers, modulo 2**64.

Every rank sums the hashes of the samples it delivered; added over all ranks, in any order, the sums must equal the
known total of ``0 .. n - 1``. A sample that was lost, repeated or replaced by another changes the sum, unless hashes
cancel, which has a chance of 2**-64. The sum travels as one 64-bit integer.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from hvdscale.data.checks import instance, integer
from hvdscale.data.hashing import derive_words, hash_integers
from hvdscale.data.types import Int64s

__all__ = ["REMEMBERED_EPOCHS", "add_sums", "known_total", "sum_of"]

REMEMBERED_EPOCHS = 64  # whose sums a reader keeps: ranks may be some epochs apart when they are stopped

_BLOCK = 1 << 14
_SALT = np.uint64(derive_words(1, "certificate")[0])


def sum_of(samples: Int64s) -> int:
    """The sum for these samples, 0 .. 2**64 - 1."""
    return int(hash_integers(samples, _SALT).sum(dtype=np.uint64))


def add_sums(sums: Iterable[int]) -> int:
    """Sums of ranks, or of parts of one epoch, together."""
    instance("sums", sums, Iterable)
    return sum(integer("Each sum", part, 0) for part in sums) % 2**64


@lru_cache(maxsize=64)
def known_total(n: int) -> int:
    """The sum for ``0 .. n - 1``. About 4 ns a sample at the first call for ``n``, then remembered."""
    blocks = range(0, n, _BLOCK)
    return add_sums(sum_of(np.arange(start, min(start + _BLOCK, n), dtype=np.int64)) for start in blocks)
