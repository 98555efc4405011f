"""``backward_passes_per_step``: add gradients up locally, and go on with their sum every so many passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
        self.counts = True  # else whoever wraps our optimizer says when a pass is over
        self._average = average
        self._sums: dict[int, Any] = {}
        self._count: Any = None
        self._kept: Any = None

    def add(self, gradients: Sequence[Any], variables: Sequence[Any]) -> None:
        """Add ``gradients``; ``None`` adds nothing."""
        for gradient, variable in zip(gradients, variables, strict=True):
            if gradient is not None:
                total = self._sum_of(variable)
                total.assign_add(ops.cast(verbs.as_dense(gradient), total.dtype))
        self._counters()[1].assign_add(1)

    def count(self, gradients: Sequence[Any], variables: Sequence[Any], go_on: Callable[[list[Any], Any], Any]) -> None:
        """A pass is over, whether its ``gradients`` were added or not.

        On every ``passes``-th call hand the sums (or means), and of how many passes they are, to ``go_on`` and start
        anew. ``None`` stays ``None``. Every rank goes on in the same call.
        """
        present = [i for i, g in enumerate(gradients) if g is not None]
        sums = [self._sum_of(variables[i]) for i in present]
        count, kept = self._counters()
        due = ops.equal(ops.mod(ops.add(count, 1), self.passes), 0)

        def update() -> None:
            whole: list[Any] = [None] * len(gradients)
            for i, total in zip(present, sums, strict=True):
                mean = ops.divide(total, self.passes) if self._average else total
                whole[i] = ops.cast(mean, variables[i].dtype)
            go_on(whole, kept)
            for s in (*sums, kept):
                s.assign(ops.zeros_like(s))

        ops.cond(due, update, lambda: None)
        count.assign_add(1)

    @contextmanager
    def counted_outside(self) -> Iterator[None]:
        """Within, a step of our optimizer adds its gradients, and no more."""
        self.counts = False
        try:
            yield
        finally:
            self.counts = True

    def _counters(self) -> tuple[Any, Any]:
        """Passes so far, and those added since the last sums were handed on."""
        if self._count is None:
            with verbs.eager():
                self._count = keras.Variable(0, dtype="int32", trainable=False, name="passes")
                self._kept = keras.Variable(0, dtype="int32", trainable=False, name="kept")
        return self._count, self._kept

    def _sum_of(self, variable: Any) -> Any:
        with verbs.eager():
            if id(variable) not in self._sums:
                dtype = "float32" if variable.dtype in ("float16", "bfloat16") else variable.dtype
                self._sums[id(variable)] = keras.Variable(
                    keras.initializers.Zeros(), shape=tuple(variable.shape), dtype=dtype, trainable=False
                )
        return self._sums[id(variable)]
