"""``backward_passes_per_step``: add gradients up locally, and go on with their sum every so many passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from hvdscale.keras.backend import verbs

__all__ = ["Accumulator"]


class Accumulator:
    """Local sums of gradients over ``passes`` backward passes.

    The sums are no variables of the optimizer: a saved model does not hold them, and a period that is
    not complete when training stops is continued by the next batch.
    """

    def __init__(self, passes: int, average: bool) -> None:
        self.passes = passes
        self._average = average
        self._sums: dict[int, Any] = {}
        self._count: Any = None

    def add(self, gradients: Sequence[Any], variables: Sequence[Any], go_on: Callable[[list[Any]], Any]) -> None:
        """Add ``gradients``; on every ``passes``-th call hand the sums (or means) to ``go_on`` and start anew.

        ``None`` stays ``None``. Every rank goes on in the same call.
        """
        present = [i for i, g in enumerate(gradients) if g is not None]
        sums = [self._sum_of(variables[i]) for i in present]
        totals = [
            ops.add(s, ops.cast(verbs.as_dense(gradients[i]), s.dtype)) for s, i in zip(sums, present, strict=True)
        ]
        due = ops.equal(ops.mod(ops.add(self._count, 1), self.passes), 0)

        def update() -> None:
            whole: list[Any] = [None] * len(gradients)
            for i, total in zip(present, totals, strict=True):
                mean = ops.divide(total, self.passes) if self._average else total
                whole[i] = ops.cast(mean, variables[i].dtype)
            go_on(whole)
            for s in sums:
                s.assign(ops.zeros_like(s))

        def keep() -> None:
            for s, total in zip(sums, totals, strict=True):
                s.assign(total)

        ops.cond(due, update, keep)
        self._count.assign_add(1)

    def _sum_of(self, variable: Any) -> Any:
        with verbs.eager():
            if self._count is None:
                self._count = keras.Variable(0, dtype="int32", trainable=False, name="passes")
            if id(variable) not in self._sums:
                dtype = "float32" if variable.dtype in ("float16", "bfloat16") else variable.dtype
                self._sums[id(variable)] = keras.Variable(
                    keras.initializers.Zeros(), shape=tuple(variable.shape), dtype=dtype, trainable=False
                )
        return self._sums[id(variable)]
