"""Hashes that are the same on every rank, machine and run: of keys, and of (seed, epoch)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash

from hvdscale.data.types import Int64s, UInt64s
from hvdscale.errors import PlanError

__all__ = ["derive_words", "hash_integers", "hash_keys", "mix", "scale"]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_LOW_HALF = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def derive_words(count: int, *facts: object) -> UInt64s:
    """``count`` (at most 8) words of 64 bits that depend on every fact, such as (stream, seed, epoch).

    The facts are hashed as text with their borders marked, so that (1, 23) and (12, 3) share nothing,
    as they would under ``seed + epoch``.
    """
    text = "".join(f"{len(str(fact))}:{fact}," for fact in facts)
    digest = hashlib.blake2b(text.encode(), digest_size=8 * count).digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)


def mix(words: UInt64s) -> UInt64s:
    """The splitmix64 step: a bijection of 64-bit words whose output bits all depend on every input bit.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    z = words + _GAMMA
    z ^= z >> np.uint64(30)
    z *= _FIRST
    z ^= z >> np.uint64(27)
    z *= _SECOND
    z ^= z >> np.uint64(31)
    return z


def scale(hashes: UInt64s, parts: int) -> Int64s:
    """``(hash * parts) >> 64``: hashes spread evenly over ``0 .. parts - 1``. ``parts`` is below 2**31."""
    k = np.uint64(parts)
    low = ((hashes & _LOW_HALF) * k) >> _HALF
    return (((hashes >> _HALF) * k + low) >> _HALF).astype(np.int64)


def hash_integers(integers: Int64s, salt: np.uint64) -> UInt64s:
    """64-bit hashes of integers under ``salt``."""
    return mix(integers.astype(np.uint64) ^ salt)


def hash_keys(keys: Sequence[Any] | np.ndarray[Any, Any], salt: np.uint64) -> UInt64s:
    """64-bit hashes of keys: integers through splitmix64, strings (as UTF-8) and bytes through xxh3.

    Raises:
        PlanError: keys of another kind, of mixed kinds, or integers beyond 64 bits.
    """
    if isinstance(keys, np.ndarray) and keys.ndim != 1:
        raise PlanError(f"Keys are one per sample: a vector. This array has shape {keys.shape}.")
    if len(keys) == 0:
        return np.zeros(0, np.uint64)
    if isinstance(keys, np.ndarray) and keys.dtype.kind in "iu":
        return hash_integers(keys, salt)
    items = keys.tolist() if isinstance(keys, np.ndarray) else list(keys)
    kinds = {_kind(i, item) for i, item in enumerate(items)}
    if len(kinds) > 1:
        raise PlanError(f"All keys must be of one kind; these mix {' and '.join(sorted(kinds))}. Convert them to str.")
    if kinds == {"integers"}:
        return hash_integers(_integers(items), salt)
    raw = (xxhash.xxh3_64_intdigest(_bytes(item)) for item in items)
    return mix(np.fromiter(raw, np.uint64, len(items)) ^ salt)


def _kind(i: int, key: object) -> str:
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        return "integers"
    if isinstance(key, str):
        return "strings"
    if isinstance(key, bytes):
        return "bytes"
    raise PlanError(f"A key is an integer, a string or bytes; key {i} is {key!r} ({type(key).__name__}).")


def _integers(items: list[Any]) -> Int64s:
    try:
        return np.array([int(item) for item in items], np.int64)
    except OverflowError:
        largest = max(items, key=abs)
        raise PlanError(f"Integer keys fit in 64 bits with sign; {largest} does not. Pass it as a string.") from None


def _bytes(key: str | bytes) -> bytes:
    # File names may hold bytes that are no UTF-8; Python keeps them as lone surrogates.
    return key.encode("utf-8", "surrogatepass") if isinstance(key, str) else key
