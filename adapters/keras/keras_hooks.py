"""Two places where Keras must know that an optimizer is distributed, and has no argument to say so.

``LossScaleOptimizer`` (Keras puts it around the optimizer under mixed_float16) skips a step when its own
gradients are not finite. Ranks would decide differently, and those that go on would wait for ever in the
reduction inside. So the gradients are reduced before that check; where they are still being accumulated,
ranks agree on the outcome of the check.

``compile(jit_compile="auto")`` turns XLA on where there is a GPU. XLA has no kernels for Horovod, so for a
model with a distributed optimizer, or one whose layers are split, "auto" means off.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
from keras import ops
from keras.src.trainers.trainer import Trainer

from hvdscale.keras.backend import verbs

__all__ = ["distributed_in", "install_hooks", "reducer_of"]


def reducer_of(optimizer: Any) -> Any:
    """The ``Reducer`` of a distributed optimizer, or ``None``."""
    return getattr(optimizer, "_hvdscale", None)


def distributed_in(optimizer: Any) -> Any:
    """The optimizer that was distributed: this one, or the one that it scales the loss for; or ``None``."""
    candidates = (optimizer, getattr(optimizer, "inner_optimizer", None))
    return next((one for one in candidates if reducer_of(one) is not None), None)


@functools.cache
def install_hooks() -> None:
    """Put both in place, once per process. Optimizers that are not distributed behave as before."""
    loss_scale: Any = keras.optimizers.LossScaleOptimizer
    loss_scale.apply = _reduce_before_check(loss_scale.apply)
    trainer: Any = Trainer
    trainer._resolve_auto_jit_compile = _auto_means_off(trainer._resolve_auto_jit_compile)


def _reduce_before_check(plain: Callable[..., Any]) -> Callable[..., Any]:
    @verbs.apart_from_compilers
    @functools.wraps(plain)
    def apply(self: Any, grads: Any, trainable_variables: Any = None) -> Any:
        inner = self.inner_optimizer
        reducer = reducer_of(inner)
        grads = list(grads)
        if reducer is not None and reducer.sharded is not None and any(g is not None for g in grads):
            # One rank's part may be finite, and another's not.
            grads = _agreed(grads, self.check_finite(grads), reducer.sharded.sum_of_copy)
        if reducer is None or not (reducer.exchanges or reducer.relaxed):
            return plain(self, grads, trainable_variables)
        variables = list(self._trainable_variables if trainable_variables is None else trainable_variables)
        if len(grads) != len(variables):
            return plain(self, grads, trainable_variables)  # Keras says what is wrong
        reducer.prepare(self, grads, variables)
        grads = reducer.complete(grads, variables)
        if not grads:
            return plain(self, grads, trainable_variables)
        if reducer.relaxed:  # a step counts, and a pass does, also where this rank alone leaves it out
            if reducer.accumulator.passes > 1:
                with reducer.accumulator.counted_outside():
                    plain(self, grads, variables)
                return inner.finish_pass(grads, variables)
            grads = reducer.reduce(grads, variables)  # in a warm-up
            with reducer.already_reduced():
                result = plain(self, grads, variables)
            reducer.after_step()
            return result
        if reducer.accumulator.passes > 1 or inner.defers:
            everywhere = functools.partial(
                verbs.sum_over_ranks, process_set=reducer.plan.process_set, name=f"{reducer.plan.name}.finite"
            )
            return plain(self, _agreed(grads, self.check_finite(grads), everywhere), variables)
        grads = reducer.reduce(grads, variables)
        with reducer.already_reduced():
            return plain(self, grads, variables)

    return apply


def _agreed(grads: list[Any], finite: Any, add: Callable[[Any], Any]) -> list[Any]:
    """``grads``, made not finite on every rank when they are so on one; ``add`` is the sum over these ranks."""
    anywhere = add(ops.cast(ops.logical_not(finite), "float32"))
    first = next(i for i, g in enumerate(grads) if g is not None)
    poison = ops.where(anywhere > 0, float("nan"), 0.0)
    dense = verbs.as_dense(grads[first])
    return [*grads[:first], ops.add(dense, ops.cast(poison, dense.dtype)), *grads[first + 1 :]]


def _auto_means_off(plain: Callable[[Any], bool]) -> Callable[[Any], bool]:
    @functools.wraps(plain)
    def resolve(self: Any) -> bool:
        optimizer = getattr(self, "optimizer", None)
        inner = getattr(optimizer, "inner_optimizer", None)
        if reducer_of(optimizer) is not None or reducer_of(inner) is not None:
            return False
        if getattr(self, "_hvdscale_sharded", False):
            return False
        return plain(self)

    return resolve
