"""Splitting samples into train, validation and test by a hash of their keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdscale.data.checks import floats, integer
from hvdscale.data.hashing import derive_words, hash_keys
from hvdscale.data.types import Int64s
from hvdscale.errors import PlanError

__all__ = ["split"]

_MOST_PARTS = 2**16


def split(
    keys: Sequence[Any] | npt.NDArray[Any], fractions: Sequence[float], salt: str | int = ""
) -> tuple[Int64s, ...]:
    """Split samples into parts by key: one int64 array of indices per fraction, each ascending.

    A key's part depends on the key alone. So a sample stays in its part as the data grows, and samples that
    share a key (a document, a speaker, a patient) are never on two sides. Parts have their fractions of the
    keys in expectation, not exactly.

    Args:
        keys: one integer, string or bytes per sample.
        fractions: one per part, each at least 0, summing to 1; ``(0.9, 0.1)``.
        salt: another salt is another split, independent of this one and of every ``ShardPlan``. A salt counts by its
            text: 1 and ``"1"`` are one salt.

    Raises:
        PlanError: fractions that are no parts of 1, or keys of no usable kind.
    """
    try:
        shares = list(floats(fractions, _MOST_PARTS))
    except (TypeError, ValueError, OverflowError):
        raise PlanError(f"Fractions are one number per part, such as (0.9, 0.1); they are {fractions!r}.") from None
    total = sum(shares)
    if not shares or not all(f >= 0 for f in shares) or not math.isclose(total, 1, abs_tol=1e-6):
        raise PlanError(f"Fractions are at least 0 and sum to 1; these are {shares!s:.200}, sum {total:g}.")
    if not isinstance(salt, str):
        if isinstance(salt, bool) or not isinstance(salt, int | np.integer):
            raise PlanError(f"salt is a str or an integer; it is {salt!r:.80}.")
        integer("salt without its sign", abs(int(salt)), 0)  # of a length that can be written
    hashes = hash_keys(keys, derive_words(1, "split", salt)[0])
    unit = (hashes >> np.uint64(11)) * 2.0**-53  # [n] in [0, 1)
    borders = np.cumsum(shares)[:-1]  # [parts - 1]
    part = np.searchsorted(borders, unit, side="right")
    return tuple(np.flatnonzero(part == i).astype(np.int64) for i in range(len(shares)))
