"""Hashes that are the same on every rank, machine and run: of keys, of samples, and of (seed, epoch)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from hvdscale.data.checks import array, numbers, shortened
from hvdscale.data.types import Keys, UInt64s
from hvdscale.errors import PlanError

__all__ = ["derive_words", "hash_blocks", "hash_integers", "hash_keys", "key_vector", "kind_of", "mix"]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_BLOCK = 1 << 14  # integers at a time: temporaries stay in the cache
_FEW = 1 << 12  # objects at a time, which are larger

_Integers = npt.NDArray[np.integer[Any]]


def derive_words(count: int, *facts: object) -> UInt64s:
    """``count`` (at most 8) words of 64 bits that depend on every fact, such as (stream, seed, epoch).

    The facts are hashed as text with their borders marked, so that (1, 23) and (12, 3) share nothing,
    as they would under ``seed + epoch``.
    """
    text = "".join(f"{len(str(fact))}:{fact}," for fact in facts)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8 * count).digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)


def mix(words: UInt64s) -> UInt64s:
    """The splitmix64 step in place: a bijection of 64-bit words whose output bits all depend on every input bit.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    t = np.empty_like(words)
    np.add(words, _GAMMA, out=words)
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        np.right_shift(words, np.uint64(shift), out=t)
        np.bitwise_xor(words, t, out=words)
        np.multiply(words, factor, out=words)
    np.right_shift(words, np.uint64(31), out=t)
    return np.bitwise_xor(words, t, out=words)


def hash_integers(integers: _Integers, salt: np.uint64) -> UInt64s:
    """64-bit hashes of integers under ``salt``. Equal values hash alike, whatever their dtype."""
    words = integers.astype(np.uint64)
    return mix(np.bitwise_xor(words, salt, out=words))


def key_vector(keys: object) -> Keys:
    """``keys`` as a vector with a length. Columns of tables and tensors become NumPy arrays.

    Raises:
        PlanError: one string, a set, a dictionary, an iterator, or an array of another shape.
    """
    vector: Any = numbers("Keys", keys) if isinstance(keys, range) else keys
    if not isinstance(keys, list | tuple | np.ndarray) and hasattr(keys, "__array__"):
        try:
            vector = np.asarray(keys)
        except (TypeError, ValueError, RuntimeError) as error:  # bfloat16, or a tensor that records gradients
            raise PlanError(f"These keys, a {type(keys).__name__}, do not become a NumPy array: {error}") from None
    if isinstance(vector, np.ndarray):
        given = array("Keys", vector)
        if given.ndim != 1:
            raise PlanError(f"Keys are one per sample: a vector. This array has shape {given.shape}.")
        return given
    if isinstance(vector, str | bytes | bytearray | memoryview) or not isinstance(vector, Sequence):
        raise PlanError(
            f"Keys are one per sample, in a list or an array; these are a {type(keys).__name__}. Give list(keys)."
        )
    return vector


def hash_keys(keys: Keys, salt: np.uint64) -> UInt64s:
    """64-bit hashes of keys: integers through splitmix64, strings (as UTF-8) and bytes through xxh3.

    Raises:
        PlanError: keys of another kind, of mixed kinds, or integers beyond 64 bits.
    """
    return np.concatenate([np.zeros(0, np.uint64), *hash_blocks(key_vector(keys), salt)])


def hash_blocks(keys: Keys, salt: np.uint64) -> Iterator[UInt64s]:
    """The same for a ``key_vector``, in blocks, so that the hashes of many keys never lie in memory together."""
    if isinstance(keys, np.ndarray) and keys.dtype.kind in "iu":
        for start in range(0, len(keys), _BLOCK):
            yield hash_integers(keys[start : start + _BLOCK], salt)
        return
    kind: type | None = None
    for start in range(0, len(keys), _FEW):
        block = keys[start : start + _FEW]
        if isinstance(block, np.ndarray) and block.dtype.kind in "SU":
            yield _hash_items(_array_items(block), bytes, salt)
            continue
        items = block if isinstance(block, list) else list(block)
        if kind in (None, str) and isinstance(items[0], str):
            try:
                hashes = _hash_strings(items, salt)  # fails at the first key of another kind: no need to look before
            except TypeError:
                _one_kind(items, kind, start)
                raise
            kind = str
            yield hashes
            continue
        kind = _one_kind(items, kind, start)
        yield _hash_items(items, kind, salt)


def _array_items(block: npt.NDArray[Any]) -> list[bytes]:
    """A block of a string or bytes array as bytes."""
    if block.dtype.kind == "S":
        return block.tolist()  # type: ignore[no-any-return]
    points = np.ascontiguousarray(block, block.dtype.newbyteorder("=")).view(np.uint32).reshape(len(block), -1)
    if points.max(initial=0) < 128:  # ASCII: one byte each, far faster than string by string
        return points.astype(np.uint8).view(f"S{points.shape[1]}").ravel().tolist()
    return [item.encode("utf-8", "surrogatepass") for item in block.tolist()]


def _hash_items(items: list[Any], kind: type, salt: np.uint64) -> UInt64s:
    if kind is int:
        return hash_integers(_integers(items), salt)
    if kind is str:
        return _hash_strings(items, salt)
    return _hash_texts(items, salt)


def _hash_texts(items: Iterable[bytes], salt: np.uint64) -> UInt64s:
    digests = b"".join(map(xxhash.xxh3_64_digest, items))  # faster than Python integers, one by one
    words = np.frombuffer(digests, ">u8").astype(np.uint64)
    return mix(np.bitwise_xor(words, salt, out=words))


def _hash_strings(items: list[str], salt: np.uint64) -> UInt64s:
    try:
        return _hash_texts(map(str.encode, items), salt)
    except UnicodeEncodeError:
        # File names may hold bytes that are no UTF-8; Python keeps them as lone surrogates.
        return _hash_texts((item.encode("utf-8", "surrogatepass") for item in items), salt)


def _one_kind(items: list[Any], kind: type | None, start: int) -> type:
    """int, str or bytes: what all of ``items``, and those of the ``kind`` before them, are.

    Raises:
        PlanError: mixed kinds, or another.
    """
    types = set(map(type, items))
    if len(types) == 1 and (only := next(iter(types))) in (int, str, bytes) and kind in (None, only):
        return only
    found = {kind} if kind else set()
    for i, item in enumerate(items):
        found.add(_kind(start + i, item))
    if len(found) > 1:
        mixed = " and ".join(sorted(_NAMES[each] for each in found))
        raise PlanError(f"All keys must be of one kind; these mix {mixed}. Convert them to str.")
    return found.pop()


def kind_of(key: object) -> str:
    """``integers``, ``strings`` or ``bytes``: what ``key`` is one of. Raises PlanError where it is none of them."""
    return _NAMES[_kind(0, key)]


_NAMES = {int: "integers", str: "strings", bytes: "bytes"}


def _kind(i: int, key: object) -> type:
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        return int
    for kind in (str, bytes):
        if isinstance(key, kind):
            return kind
    raise PlanError(f"A key is an integer, a string or bytes; key {i} is {shortened(key)} ({type(key).__name__}).")


def _integers(items: list[Any]) -> _Integers:
    for dtype in (np.int64, np.uint64):
        try:
            return np.fromiter(map(int, items), dtype, len(items))
        except OverflowError:
            continue
    largest = max(items, key=abs)
    raise PlanError(
        f"Integer keys fit in 64 bits; {shortened(largest)} does not, or not beside others. Pass them as strings."
    )
