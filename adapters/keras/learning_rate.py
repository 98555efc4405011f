"""Learning rates that follow the epoch, and warm up from one worker's rate to that of all.

Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", arXiv 1706.02677.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from hvdscale.errors import PlanError
from hvdscale.keras.backend import verbs

__all__ = ["LearningRateScheduleCallback", "LearningRateWarmupCallback"]


class LearningRateScheduleCallback(keras.callbacks.Callback):
    """Set the learning rate to ``initial_lr * multiplier(epoch)`` between two epochs.

    Momentum correction (section 3 of the paper): where the rate changes by a factor, the velocities change by
    the same factor before the step, so that past gradients count at the new rate. It is done on the
    optimizer's velocities, because compiled steps do not see a change of ``optimizer.momentum``. For
    Nesterov momentum the look-ahead keeps the plain coefficient.

    Args:
        initial_lr: the learning rate that is multiplied.
        multiplier: a function of the epoch, or a number ``m`` that stands for ``m ** (epoch - start_epoch)``.
        start_epoch: first epoch in which the rate is set.
        end_epoch: first epoch in which it is no longer set; ``None`` for ever.
        staircase: set it once an epoch, for a whole epoch number; otherwise before every batch, for
            ``epoch + batch / steps_per_epoch``.
        momentum_correction: as above, for optimizers with momentum.
        steps_per_epoch: batches of an epoch; read from ``fit`` where it knows.

    Raises:
        PlanError: no ``initial_lr``; when training begins: the optimizer follows a schedule of its own,
            or the number of batches is not known.
    """

    def __init__(
        self,
        initial_lr: float,
        multiplier: float | Callable[[float], float],
        start_epoch: int = 0,
        end_epoch: int | None = None,
        staircase: bool = True,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
    ) -> None:
        super().__init__()
        if initial_lr is None:
            raise PlanError("initial_lr is the learning rate that is multiplied; give a number such as 0.1.")
        self.initial_lr = initial_lr
        self.start_epoch = start_epoch
        self.end_epoch = end_epoch
        self.staircase = staircase
        self.momentum_correction = momentum_correction
        self.steps_per_epoch = steps_per_epoch
        self.current_epoch = 0
        self.multiplier = multiplier if callable(multiplier) else lambda e: multiplier ** (e - start_epoch)

    def on_train_begin(self, logs: Any = None) -> None:
        optimizer = self._optimizer()
        if not isinstance(optimizer._learning_rate, keras.Variable):
            raise PlanError(
                f"{type(optimizer).__name__} follows {type(optimizer._learning_rate).__name__}, so a callback cannot "
                "set its learning rate. Give it a number, or leave the callback out."
            )
        if not self.staircase and not self.steps_per_epoch:
            self.steps_per_epoch = self.params.get("steps")
            if not self.steps_per_epoch:
                raise PlanError("fit does not know how many batches an epoch has; give steps_per_epoch=.")

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.current_epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self.current_epoch < self.start_epoch:
            return
        if self.end_epoch is not None and self.current_epoch >= self.end_epoch:
            return
        if not self.staircase:
            self._set(self.current_epoch + batch / float(self.steps_per_epoch or 1))
        elif batch == 0:
            self._set(self.current_epoch)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if logs is not None:
            logs["lr"] = self._rate()

    def _set(self, epoch: float) -> None:
        optimizer = self._optimizer()
        before, after = self._rate(), self.initial_lr * self.multiplier(epoch)
        optimizer.learning_rate = after
        if not self.momentum_correction or not getattr(optimizer, "momentum", 0) or before in (0.0, after):
            return
        velocities = getattr(optimizer, "momentums", None) or getattr(optimizer, "_momentums", None) or ()
        for velocity in velocities:
            if velocity is not None:
                velocity.assign(keras.ops.multiply(velocity, after / before))

    def _rate(self) -> float:
        return float(keras.ops.convert_to_numpy(self._optimizer().learning_rate))

    def _optimizer(self) -> Any:
        optimizer = self.model.optimizer
        return getattr(optimizer, "inner_optimizer", optimizer)


class LearningRateWarmupCallback(LearningRateScheduleCallback):
    """Raise the learning rate from ``initial_lr / size`` to ``initial_lr``, a little before every batch.

    After ``warmup_epochs`` epochs it is left at ``initial_lr``.

    Args:
        initial_lr: the rate for all workers together (one worker's rate times their number).
        warmup_epochs: epochs the rise takes.
        momentum_correction, steps_per_epoch: as in ``LearningRateScheduleCallback``.
        verbose: 1 prints a line on rank 0 when it is done.
    """

    def __init__(
        self,
        initial_lr: float,
        warmup_epochs: int = 5,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
        verbose: int = 0,
    ) -> None:
        def multiplier(epoch: float) -> float:
            # The last batch of the last warm-up epoch has the full rate.
            epoch += 1.0 / float(self.steps_per_epoch or 1)
            size = verbs.world().size
            return (epoch * (size - 1) / warmup_epochs + 1) / size

        super().__init__(
            initial_lr,
            multiplier,
            start_epoch=0,
            end_epoch=warmup_epochs,
            staircase=False,
            momentum_correction=momentum_correction,
            steps_per_epoch=steps_per_epoch,
        )
        self.verbose = verbose

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_end(epoch, logs)
        if self.verbose > 0 and epoch + 1 == self.end_epoch and verbs.world().rank == 0:
            print(f"\nEpoch {epoch + 1}: the learning rate has warmed up to {self._rate():g}.")
