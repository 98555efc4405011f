"""Checks of arguments, each with an error that gives the rule and the value."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdscale.data.types import Int64s, Share
from hvdscale.errors import PlanError, StateError

__all__ = [
    "MOST_SHARDS",
    "array",
    "differ",
    "flag",
    "floats",
    "function",
    "instance",
    "integer",
    "numbers",
    "numbers_below",
    "one_of",
    "own_shard",
    "shares_from",
    "shortened",
    "states_of_all",
    "weights_for",
]

MOST_SHARDS = 2**16 - 1
_MOST = 2**36  # numbers of a range, in memory
_MOST_BITS = 4096


def instance(name: str, value: object, *kinds: type) -> None:
    """Raises PlanError where ``value`` is of none of ``kinds``."""
    if not isinstance(value, kinds):
        raise PlanError(f"{name} is a {' or '.join(kind.__name__ for kind in kinds)}; it is {value!r:.80}.")


def flag(name: str, value: object) -> bool:
    """``value`` as a bool. Raises PlanError where it is none."""
    if not isinstance(value, bool | np.bool_):
        raise PlanError(f"{name} is True or False; it is {value!r:.80}.")
    return bool(value)


def function(name: str, value: object) -> None:
    """Raises PlanError where ``value`` is neither None nor a function."""
    if value is not None and not callable(value):
        raise PlanError(f"{name} is a function; it is {value!r:.80}.")


def differ(one: object, other: object) -> bool:
    """Whether two values of states are not the same. What JSON cannot hold is like nothing else."""
    try:
        return bool(one != other)
    except (TypeError, ValueError):  # arrays, which compare element by element
        return True


def array(name: str, values: npt.ArrayLike) -> npt.NDArray[Any]:
    """``values`` as an array.

    Raises:
        PlanError: lists of unequal length, or a masked array that hides something.
    """
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        missing = int(np.count_nonzero(np.ma.getmaskarray(values)))
        raise PlanError(f"{name} must all be there; {missing} of this masked array are not.")
    if isinstance(values, range):
        return numbers(name, values)
    try:
        return np.asarray(values)
    except ValueError:
        raise PlanError(f"{name} are one array; these lists are of unequal length: {values!r:.80}.") from None


def numbers(name: str, span: range) -> npt.NDArray[Any]:
    """A range as an array.

    Raises:
        PlanError: of more numbers than any memory holds.
    """
    count = max(0, -((span.start - span.stop) // span.step))  # len() has an end of its own
    if count > _MOST:
        raise PlanError(f"{name} lie in memory together, at most {_MOST:,}; {span} are {count:,}. Give them in parts.")
    low, high = min(span.start, span.stop), max(span.start, span.stop)
    if low >= -(2**63) and high < 2**63:
        return np.arange(span.start, span.stop, span.step, dtype=np.int64)
    return np.array(list(span), np.uint64 if low >= 0 and high <= 2**64 else object)


def integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """``value`` as an int in ``low .. high``.

    Raises:
        PlanError: it is no integer (a bool is none), or out of range.
    """
    limits = f"from {low}" if high is None else f"in {low}..{high}"
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is not None and number.bit_length() > _MOST_BITS:  # which Python itself refuses to print
        raise PlanError(f"{name} must be an integer {limits}; it has {number.bit_length():,} bits.")
    if number is None or isinstance(value, bool) or number < low or (high is not None and number > high):
        raise PlanError(f"{name} must be an integer {limits}; it is {value!r:.80}.")
    return number


def numbers_below(name: str, values: npt.ArrayLike, count: int) -> Int64s:
    """``values`` as int64 of the same shape, each in ``0 .. count - 1``.

    Raises:
        PlanError: one is not, or they are no integers.
    """
    given = array(name, values)
    if given.size and given.dtype.kind not in "iu":
        raise PlanError(f"{name} are integers in 0..{count - 1}; these are {given.dtype}.")
    if given.size and not 0 <= int(given.min()) <= int(given.max()) < count:
        raise PlanError(f"{name} lie in 0..{count - 1}; these go from {given.min()} to {given.max()}.")
    return given.astype(np.int64)


def shortened(value: object) -> str:
    """``value`` as Python writes it, at most 80 characters: a key or a field of a state may be as long as a book."""
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:  # which Python itself refuses to print
        return f"an integer of {value.bit_length():,} bits"
    text = f"{value!r:.81}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def one_of(name: str, value: object, names: Sequence[str]) -> None:
    """Raises PlanError where ``value`` is none of ``names``."""
    if not isinstance(value, str) or value not in names:
        raise PlanError(f"{name} is one of {', '.join(map(repr, names))}; it is {value!r:.80}.")


def own_shard(shard: int | None, shards: int, rank: int, ranks: int) -> int:
    """``shard``, or that of this rank where it is ``None``.

    Raises:
        PlanError: this rank's, but the plan has not one shard per rank.
    """
    if shard is not None:
        return shard
    if ranks != shards:
        raise PlanError(
            f"The plan has {shards} shards and the job {ranks} ranks. Make the plan for hvd.size() shards, "
            "or say which shard this rank reads: shard=..."
        )
    return rank


def states_of_all(states: object) -> list[Any]:
    """The states that ``resume`` was given, as a list.

    Raises:
        StateError: there are none, or this is one state, or no list.
    """
    if isinstance(states, str | bytes | Mapping | np.ndarray) or not isinstance(states, Iterable):
        raise StateError(f"resume takes the states of all shards, as a list; this is {str(states)[:80]!r}.")
    found = list(states)
    if not found:
        raise StateError("resume takes the states of all shards, as a list; there are none. Give one per shard.")
    return found


def weights_for(shards: int, weights: Sequence[float] | None) -> tuple[float, ...] | None:
    """One positive finite weight per shard, or ``None`` for equal shards.

    Raises:
        PlanError: weights of another number, or one that is zero, negative or not finite.
    """
    if weights is None:
        return None
    try:
        given = floats(weights, shards + 1)
    except (TypeError, ValueError, OverflowError):
        raise PlanError(
            f"weights are one positive number per shard, in the order of shards; they are {weights!r:.200}."
        ) from None
    if len(given) != shards:
        raise PlanError(f"weights are one positive number per shard; there are {shards} shards, {len(given)} weights.")
    for shard, weight in enumerate(given):
        if not (weight > 0 and math.isfinite(weight)):
            raise PlanError(f"Each weight is positive and finite; that of shard {shard} is {weight:g}.")
    return None if len(set(given)) == 1 else given


def floats(values: Iterable[Any], most: int) -> tuple[float, ...]:
    """Numbers in an order, as floats; ``most`` of what may have no end.

    Raises:
        TypeError, ValueError, OverflowError: they are not that.
    """
    if isinstance(values, str | bytes | Mapping | Set):
        raise TypeError
    found = list(values if isinstance(values, list | tuple | np.ndarray) else itertools.islice(values, most))
    if any(isinstance(value, str | bytes | bool | np.bool_) for value in found):
        raise TypeError
    return tuple(map(float, found))


def shares_from(saved: Iterable[Any]) -> tuple[Share, ...]:
    """Pairs of shards and their weights.

    Raises:
        PlanError: something else, or shards or weights that cannot be.
    """
    try:
        pairs = [(shards, weights) for shards, weights in saved]
    except (TypeError, ValueError):
        raise PlanError(f"Shares are pairs of shards and weights; these are {saved!r:.80}.") from None
    return tuple((number := integer("shards", shards, 1, MOST_SHARDS), weights_for(number, w)) for shards, w in pairs)
