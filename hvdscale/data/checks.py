"""Checks of arguments, each with an error that gives the rule and the value."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

from hvdscale.errors import PlanError

__all__ = ["integer", "one_of", "own_shard", "weights_for"]


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
    if number is None or isinstance(value, bool) or number < low or (high is not None and number > high):
        raise PlanError(f"{name} must be an integer {limits}; it is {value!r}.")
    return number


def one_of(name: str, value: object, names: Sequence[str]) -> None:
    """Raises PlanError where ``value`` is none of ``names``."""
    if value not in names:
        raise PlanError(f"{name} is one of {', '.join(map(repr, names))}; it is {value!r}.")


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


def weights_for(shards: int, weights: Sequence[float] | None) -> tuple[float, ...] | None:
    """One positive finite weight per shard, or ``None`` for equal shards.

    Raises:
        PlanError: weights of another number, or one that is zero, negative or not finite.
    """
    if weights is None:
        return None
    try:
        given = tuple(float(weight) for weight in weights)
    except (TypeError, ValueError):
        raise PlanError(f"weights are one positive number per shard; they are {weights!r}.") from None
    if len(given) != shards:
        raise PlanError(f"weights are one positive number per shard; there are {shards} shards, {len(given)} weights.")
    for shard, weight in enumerate(given):
        if not (weight > 0 and math.isfinite(weight)):
            raise PlanError(f"Each weight is positive and finite; that of shard {shard} is {weight:g}.")
    return None if len(set(given)) == 1 else given
