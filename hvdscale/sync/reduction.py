"""How the gradients of all ranks become one: the arguments of ``DistributedOptimizer``, checked once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from operator import index
from typing import Any, Literal

from hvdscale.errors import PlanError

__all__ = ["Reduction", "read_groups"]

Op = Literal["average", "sum", "adasum"]

_MESSAGES = 4  # of a small model: one travels while the backward pass makes the next
_LEAST_BYTES, _MOST_BYTES = 1 << 20, 25 << 20


@dataclass(frozen=True)
class Reduction:
    """A validated reduction of gradients.

    Args:
        op: ``"average"``, ``"sum"`` or ``"adasum"`` over ranks.
        predivide: with ``"average"``, gradients are divided by it before the sum and multiplied after,
            so that half-precision sums do not overflow.
        passes: backward passes (micro-batches) per reduction.
        groups: tensors reduced as one message: a number of groups, positions per group, or ``None``.
        sparse_as_dense: turn sparse gradients into dense ones first.

    Raises:
        PlanError: a value that cannot be, or a combination Horovod has no meaning for.
    """

    op: Op = "average"
    predivide: float = 1.0
    passes: int = 1
    groups: int | tuple[tuple[int, ...], ...] | None = None
    sparse_as_dense: bool = False

    def __post_init__(self) -> None:
        if self.op not in ("average", "sum", "adasum"):
            raise PlanError(f"op must be Average, Sum or Adasum, got {self.op!r}.")
        if self.passes < 1 or int(self.passes) != self.passes:
            raise PlanError(f"backward_passes_per_step must be a whole number > 0, got {self.passes!r}.")
        if not self.predivide > 0:
            raise PlanError(f"gradient_predivide_factor must be > 0, got {self.predivide!r}.")
        if self.predivide != 1.0 and self.op != "average":
            raise PlanError(
                f"gradient_predivide_factor={self.predivide} splits an average in two; with op={self.op} there is "
                "none to split. Leave it at 1.0, or use op=Average."
            )
        if isinstance(self.groups, int) and self.groups < 1:
            raise PlanError(
                f"groups must be a number of groups > 0 or a list of lists of parameters, got {self.groups!r}."
            )
        if isinstance(self.groups, tuple):
            positions = [p for group in self.groups for p in group]
            if len(set(positions)) != len(positions):
                raise PlanError("A parameter can appear in one group only; some appear in several.")

    def scales(self) -> tuple[float, float]:
        """``(before, after)`` the sum; Horovod itself divides an average by the number of ranks."""
        return (1.0 / self.predivide, self.predivide)

    def buckets(self, positions: Sequence[int], size_bytes: Sequence[int] = ()) -> list[list[int]]:
        """Split ``positions`` of the registry into the groups that travel together, in order.

        With a number of groups: that many, of nearly equal length. With explicit groups: those, then each
        remaining position alone. Without: by ``size_bytes``, one per position, neighbours together and the last
        first, as backward passes make gradients; each alone where sizes are not given, or for Adasum, which looks
        at each tensor by itself.
        """
        if self.groups is None:
            alone = self.op == "adasum" or not size_bytes
            return [[p] for p in positions] if alone else _neighbours(positions, size_bytes)
        if isinstance(self.groups, int):
            count = min(self.groups, len(positions))
            edges = [len(positions) * i // count for i in range(count + 1)] if count else [0]
            return [list(positions[a:b]) for a, b in pairwise(edges)]
        present = set(positions)
        grouped = [[p for p in group if p in present] for group in self.groups]
        taken = {p for group in grouped for p in group}
        return [g for g in grouped if g] + [[p] for p in positions if p not in taken]


def _neighbours(positions: Sequence[int], size_bytes: Sequence[int]) -> list[list[int]]:
    """A few large messages: every one makes all ranks meet, which costs those that share cores their time."""
    limit = min(max(sum(size_bytes) / _MESSAGES, _LEAST_BYTES), _MOST_BYTES)
    buckets: list[list[int]] = []
    filled = 0
    for position, size in zip(reversed(positions), reversed(size_bytes), strict=True):
        if not buckets or filled + size > limit:
            buckets.append([])
            filled = 0
        buckets[-1].append(position)
        filled += size
    return buckets


def read_groups(groups: Any) -> tuple[int | None, tuple[tuple[Any, ...], ...]]:
    """Horovod's ``groups`` as ``(number of groups or None, lists of variables)``.

    Raises:
        PlanError: neither a whole number > 0 nor lists of things that have a shape.
    """
    if groups is None:
        return None, ()
    if isinstance(groups, Integral) and not isinstance(groups, bool) and index(groups) > 0:
        return index(groups), ()
    lists = _lists(groups)
    if lists is None:
        raise PlanError(
            f"groups must be a whole number of groups > 0 or a list of lists of variables, got {groups!r}. "
            "Leave it out for one message per dtype."
        )
    for variable in (v for group in lists for v in group):
        if not hasattr(variable, "shape"):
            raise PlanError(
                "groups must be a whole number of groups > 0 or a list of lists of variables, "
                f"got a {type(variable).__name__} in a list: {variable!r}."
            )
    return None, lists


def _lists(groups: Any) -> tuple[tuple[Any, ...], ...] | None:
    if not isinstance(groups, Iterable) or isinstance(groups, str) or hasattr(groups, "shape"):
        return None
    outer = tuple(groups)
    if any(not isinstance(g, Iterable) or isinstance(g, str) or hasattr(g, "shape") for g in outer):
        return None
    return tuple(tuple(group) for group in outer)
