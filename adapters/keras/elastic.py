"""Training that survives ranks that come and go: every public name of ``horovod.keras.elastic``."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from horovod.common.elastic import ObjectState

from hvdscale.errors import PlanError
from hvdscale.keras.backend import verbs
from hvdscale.keras.keras_hooks import distributed_in, reducer_of
from hvdscale.keras.replicas import broadcast_variables, model_state
from hvdscale.runtime.values import ExactValues

__all__ = [
    "CommitStateCallback",
    "KerasState",
    "UpdateBatchStateCallback",
    "UpdateEpochStateCallback",
    "run",
]


run = verbs.hvd.elastic.run


class KerasState(ExactValues, ObjectState):
    """A model, its optimizer and further values: saved in memory, restored after a failure, shared by rank 0.

    Args:
        model: a built Keras model.
        optimizer: its optimizer; by default the one it was compiled with.
        kwargs: further values, which become attributes (``state.epoch``): numbers, strings, bytes, NumPy arrays,
            and lists, tuples, sets and dictionaries of them. They arrive as they are, in type and value.

    Raises:
        PlanError: the model has no variables yet, or there is no optimizer.
        StateError: another kind of value, when it is given and at each commit.
    """

    def __init__(self, model: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.model = model
        self.optimizer: Any = optimizer if optimizer is not None else getattr(model, "optimizer", None)
        if not model.built:
            raise PlanError(f"Model {model.name!r} has no variables yet. Call model.build(input_shape) first.")
        if self.optimizer is None:
            raise PlanError(f"Model {model.name!r} has no optimizer. Compile it, or pass optimizer=.")
        if not self.optimizer.built:
            self.optimizer.build(model.trainable_variables)
        self._keep()
        super().__init__(verbs.control, verbs.hvd.rank, **kwargs)

    def save(self) -> None:
        """Keep the current values in memory."""
        self._keep()
        super().save()

    def restore(self) -> None:
        """Go back to the values kept last."""
        for variable, value in zip(self._variables(), self._kept, strict=True):
            variable.assign(value)
        super().restore()

    def sync(self) -> None:
        """Give every rank the values of rank 0, and keep them."""
        broadcast_variables(self._variables())
        self._keep()
        reducer = reducer_of(distributed_in(self.optimizer))
        if reducer is not None:
            reducer.join(self.model.trainable_variables)
            if getattr(self.model, "train_function", None) is not None:
                self.model.make_train_function(force=True)  # a compiled step may hold the old number of ranks
        super().sync()

    def _variables(self) -> list[Any]:
        return [*model_state(self.model), *self.optimizer.variables]

    def _keep(self) -> None:
        self._kept = [np.array(keras.ops.convert_to_numpy(v)) for v in self._variables()]


class CommitStateCallback(keras.callbacks.Callback):
    """Commit ``state`` every ``batches_per_commit`` batches and at the end of every epoch.

    With ``steps_per_execution`` it looks only after each execution.
    """

    def __init__(self, state: Any, batches_per_commit: int = 1) -> None:
        super().__init__()
        self.state = state
        self.batches_per_commit = batches_per_commit
        self.batches_remaining = batches_per_commit

    def on_train_begin(self, logs: Any = None) -> None:
        self.batches_remaining = self.batches_per_commit  # the same on ranks that joined just now

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.batches_remaining -= 1
        if self.batches_remaining == 0:
            self.state.commit()
            self.batches_remaining = self.batches_per_commit

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.state.commit()


class UpdateBatchStateCallback(keras.callbacks.Callback):
    """Keep ``state.batch`` at the number of the last finished batch of the epoch; 0 between epochs.

    Place it before ``CommitStateCallback``. To continue inside an epoch, pass
    ``steps_per_epoch=steps - state.batch`` to ``fit``: Keras 3 fixes the number of steps before callbacks run.
    """

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.state.batch = batch

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.state.batch = 0


class UpdateEpochStateCallback(keras.callbacks.Callback):
    """Keep ``state.epoch`` at the number of finished epochs, counted over restarts.

    ``fit`` may be called with ``initial_epoch=state.epoch`` or for the epochs that are left; both count right.
    """

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state
        self._finished = 0
        self._first: int | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        self._finished = self.state.epoch
        self._first = None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if self._first is None:
            self._first = epoch

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.state.epoch = self._finished + epoch - (self._first or 0) + 1
