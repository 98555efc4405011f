"""The state of an optimizer built on slices, as that of a plain one: saved whole, loaded by any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from hvdscale.errors import StateError
from hvdscale.keras.backend import verbs
from hvdscale.keras.placed import PlacedUpdate, dtype_of, master_dtype
from hvdscale.keras.replicas import broadcast_variables
from hvdscale.keras.store import slots_of
from hvdscale.runtime.patience import patience

__all__ = ["PlacedState", "common_state"]


class PlacedState:
    """What is saved of one optimizer with placed updates.

    Args:
        base: the optimizer's own class, without the distribution.
        optimizer: built on the slices of ``placed``.
    """

    def __init__(self, base: Any, optimizer: Any, placed: PlacedUpdate) -> None:
        self._base = base
        self._optimizer = optimizer
        self._placed = placed
        self._kept: tuple[int, Any] | None = None  # after a flush: of which step, and on the first rank the whole

    def plain(self) -> Any:
        """A plain optimizer of the same settings, built on the whole variables."""
        made = self._base.from_config(self._optimizer.get_config())
        with verbs.eager():
            made.build(self._placed.variables)
        return made

    def whole(self) -> Any:
        """A plain optimizer with the whole state, on every rank. Collective, except after a flush.

        Raises:
            StateError: after a flush, on ranks that do not hold it.
        """
        if self._kept is not None and self._kept[0] == self._step():
            if self._kept[1] is None:
                raise StateError(
                    "After optimizer.sync.flush() the first rank holds the whole optimizer state, and this is another "
                    "one. Save there, or, without flush(), on every rank."
                )
            return self._kept[1]
        with verbs.eager(), patience(f'Saving an optimizer with update="{self._placed.update}"'):
            return self._gather()

    def flush(self) -> None:
        """Bring the whole state to the first rank, which can then save without the others. Collective."""
        whole = self.whole() if self._kept is None or self._kept[0] != self._step() else self._kept[1]
        self._kept = (self._step(), whole if self._placed.rank == 0 else None)

    def adopt(self, whole: Any) -> None:
        """Take this rank's part of a plain optimizer's state."""
        self._kept = None
        slots, theirs = slots_of(self._optimizer), slots_of(whole)
        for target, source in zip(_others(self._optimizer, slots), _others(whole, theirs), strict=False):
            target.assign(keras.ops.convert_to_numpy(source))
        for name, values in theirs.items():
            for i, piece in enumerate(self._placed.pieces):
                flat = np.asarray(keras.ops.convert_to_numpy(values[piece.tensor])).reshape(-1)
                target = slots[name][i]
                target.assign(flat[piece.start : piece.stop].reshape(target.shape).astype(dtype_of(target)))

    def bytes(self) -> int:
        """What this rank's optimizer state takes, without step count and rate; float32 masters included."""
        held = [v for values in slots_of(self._optimizer).values() for v in values]
        masters = [s for s in self._placed.slices if dtype_of(s) != dtype_of(self._placed.owners[id(s)])]
        return sum(np.dtype(dtype_of(v)).itemsize * int(np.prod(v.shape)) for v in [*held, *masters])

    def _step(self) -> int:
        return int(keras.ops.convert_to_numpy(self._optimizer._iterations))

    def _gather(self) -> Any:
        whole = self.plain()
        placed, plan = self._placed, self._placed.plan
        slots, theirs = slots_of(self._optimizer), slots_of(whole)
        ranks = plan.process_set.ranks or [0]
        if placed.update == "central":
            if placed.rank == 0:  # built on whole variables: one for one
                for target, source in zip(whole.variables, self._optimizer.variables, strict=True):
                    target.assign(keras.ops.convert_to_numpy(source))
            broadcast_variables(whole.variables, ranks[0], plan.process_set)
            return whole
        for target, source in zip(_others(whole, theirs), _others(self._optimizer, slots), strict=False):
            target.assign(keras.ops.convert_to_numpy(source))
        broadcast_variables(_others(whole, theirs), ranks[placed.stepping], plan.process_set)
        places = {piece: i for i, piece in enumerate(placed.pieces)}
        for name in sorted(theirs):
            for number, bucket in enumerate(placed.placement.buckets):
                share = np.zeros(bucket.shares[placed.rank], master_dtype(theirs[name][bucket.tensors[0]]))
                for piece in bucket.pieces(placed.rank):
                    share[piece.place] = np.asarray(keras.ops.convert_to_numpy(slots[name][places[piece]])).reshape(-1)
                joined = verbs.gather_slices_of(
                    verbs.tensor(share), plan.process_set, f"{plan.name}.state.{name}.{number}"
                )
                flat = np.asarray(keras.ops.convert_to_numpy(joined))
                for position, at in zip(bucket.tensors, bucket.places(), strict=True):
                    target = theirs[name][position]
                    target.assign(flat[at].reshape(target.shape).astype(dtype_of(target)))
        return whole


def _others(optimizer: Any, slots: dict[str, list[Any]]) -> list[Any]:
    """The optimizer's variables that belong to no variable of the model: step count, rate."""
    owned = {id(v) for values in slots.values() for v in values}
    return [v for v in optimizer.variables if id(v) not in owned]


def common_state(optimizer: Any) -> list[Any]:
    """The optimizer's variables that are, or should be, the same on every rank: all, unless updates are placed."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    reducer = getattr(inner, "_hvdscale", None)
    if reducer is None or reducer.placed is None:
        return list(optimizer.variables)
    # Not what it keeps for each variable, which may be a number, too: Adafactor's placeholders for vectors.
    lists = [v for name, v in vars(inner).items() if isinstance(v, list | tuple) and name != "_variables"]
    of_each = {id(v) for values in lists if len(values) == len(inner._trainable_variables) for v in values}
    outer: Sequence[Any] = () if inner is optimizer else optimizer._variables
    return [*outer, *(v for v in inner.variables if id(v) not in of_each and len(v.shape) == 0)]
