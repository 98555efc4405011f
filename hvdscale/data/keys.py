"""Keys of samples, hashed to one of 65536 units. All of a unit belongs to one shard."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt
import xxhash

from hvdscale.data.checks import shortened
from hvdscale.data.hashing import derive_words, hash_blocks, hash_integers
from hvdscale.data.types import Int64s, Keys, Share, Table, UInt64s
from hvdscale.errors import PlanError

__all__ = ["UNITS", "HashedKeys", "IndexKeys", "hash_units", "salt_of"]

UNITS = 1 << 16
_COUNTED = 1 << 20  # samples counted at a time: bincount makes 8 bytes of the 2 of each
_HASHED = 1 << 14  # samples hashed at a time: temporaries stay in the cache
_SHIFT = np.uint64(48)  # the unit is the hash's top 16 bits


def salt_of(seed: int) -> np.uint64:
    """What makes the hash of one seed another than that of the next."""
    return np.uint64(derive_words(1, "hash", seed)[0])


def hash_units(hashes: UInt64s) -> npt.NDArray[np.uint16]:
    """The unit of each hash."""
    return (hashes >> _SHIFT).astype(np.uint16)


@dataclass(frozen=True)
class IndexKeys:
    """``n`` samples without keys: the index is the key, hashed when it is asked for."""

    n: int
    seed: int
    digest: str = ""

    def __len__(self) -> int:
        return self.n

    def units(self, start: int, stop: int) -> npt.NDArray[np.uint16]:
        """Units of the samples ``start .. stop - 1``."""
        return hash_units(hash_integers(np.arange(start, stop), salt_of(self.seed)))

    def units_of(self, samples: Int64s) -> npt.NDArray[np.uint16]:
        """Units of these samples, in their shape."""
        return hash_units(hash_integers(samples, salt_of(self.seed)))

    @property
    def counts(self) -> Int64s:
        """Samples in each unit: int64[65536], read-only. Some ns a sample at the first call, then remembered."""
        return _counts(self)


@dataclass(frozen=True)
class HashedKeys:
    """What a plan keeps of its keys: two bytes a sample. ``digest`` tells keys apart."""

    seed: int
    digest: str
    _units: npt.NDArray[np.uint16] = field(repr=False, compare=False)

    @classmethod
    def of(cls, keys: Keys, seed: int, unique: bool = False) -> HashedKeys:
        """Hash the keys under ``seed``.

        Raises:
            PlanError: keys of no usable kind; with ``unique``, keys that occur twice.
        """
        try:
            units = np.empty(len(keys), np.uint16)
        except (MemoryError, ValueError):
            raise PlanError(
                f"A plan keeps two bytes of each key; {2 * len(keys):,} bytes for {len(keys):,} keys are not to be "
                "had. Without keys the index is the key, and nothing is kept."
            ) from None
        digest = xxhash.xxh3_64()
        kept: list[UInt64s] = []
        place = 0
        for hashes in hash_blocks(keys, salt_of(seed)):
            digest.update(hashes.data)
            units[place : place + len(hashes)] = hash_units(hashes)
            place += len(hashes)
            if unique:
                kept.append(hashes)
        if unique:
            _refuse_repeats(keys, kept)
        return cls(seed, digest.hexdigest(), units)

    def __len__(self) -> int:
        return len(self._units)

    def units(self, start: int, stop: int) -> npt.NDArray[np.uint16]:
        """Units of the samples ``start .. stop - 1``."""
        return self._units[start:stop]

    def units_of(self, samples: Int64s) -> npt.NDArray[np.uint16]:
        """Units of these samples, in their shape."""
        return self._units[samples]

    @cached_property
    def even_tables(self) -> dict[tuple[Share, ...], Table]:
        """What ``even_table`` has made for these keys, by shares."""
        return {}

    @cached_property
    def counts(self) -> Int64s:
        """Samples in each unit: int64[65536], read-only."""
        return _count(self)


def _count(keys: HashedKeys | IndexKeys) -> Int64s:
    counts = np.zeros(UNITS, np.int64)
    for start in range(0, len(keys), _COUNTED):
        stop = min(start + _COUNTED, len(keys))
        units = [keys.units(first, min(first + _HASHED, stop)) for first in range(start, stop, _HASHED)]
        counts += np.bincount(np.concatenate(units), minlength=UNITS)
    counts.flags.writeable = False
    return counts


_counts = lru_cache(maxsize=4)(_count)  # plans made of one another ask for the same


def _refuse_repeats(keys: Keys, hashes: list[UInt64s]) -> None:
    every = np.concatenate([np.zeros(0, np.uint64), *hashes])
    order = np.argsort(every, kind="stable")
    pairs = np.flatnonzero(every[order][1:] == every[order][:-1])
    same = [(a, b) for a, b in zip(order[pairs], order[pairs + 1], strict=True) if keys[a] == keys[b]]
    if same:
        first, second = same[0]
        raise PlanError(
            f"Keys were promised to be unique; {len(same)} repeat an earlier one: keys {first} and {second} "
            f"are both {shortened(keys[first])}. Leave unique_keys out, or mend the keys."
        )
