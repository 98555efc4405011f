"""Callbacks that make ranks agree: on the first weights, and on the metrics of an epoch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from hvdscale.errors import PlanError
from hvdscale.keras.backend import verbs
from hvdscale.keras.first_weights import has_weights, when_built
from hvdscale.keras.placed_state import common_state
from hvdscale.keras.replicas import agree_on, broadcast_variables, model_state

__all__ = ["BroadcastGlobalVariablesCallback", "MetricAverageCallback"]

_World = verbs.hvd.global_process_set


class BroadcastGlobalVariablesCallback(keras.callbacks.Callback):
    """Copy the model's weights and the optimizer's state from one rank before the first step of ``fit``.

    A model that its first batch builds is shared when that has built it, before it is computed. Seed generators
    are not shared: dropout differs from rank to rank.

    Args:
        root_rank: the rank whose values everyone gets.
        device: accepted as Horovod does; Keras places the operations.
        local_variables: a variable or several that stay as they are.

    Raises:
        PlanError: ``local_variables`` holds something else than variables.
        DesyncError: when training begins, if ranks hold different models or optimizers, or only some have built
            theirs.
    """

    def __init__(self, root_rank: int, device: str = "", local_variables: Any = None) -> None:
        super().__init__()
        self.root_rank = root_rank
        self.device = device
        self.broadcast_done = False
        given = [] if local_variables is None else local_variables
        given = list(given) if isinstance(given, Iterable) and not hasattr(given, "dtype") else [given]
        self._local: set[int] = set()
        for variable in given:
            self.register_local_var(variable)

    def register_local_var(self, var: Any) -> None:
        """Leave this variable as it is on each rank."""
        if not hasattr(var, "assign"):
            raise PlanError(f"local_variables takes variables, got {var!r}.")
        self._local.update((id(var), id(getattr(var, "value", var))))

    def on_train_begin(self, logs: Any = None) -> None:
        built = has_weights(self.model)
        if verbs.world().size > 1:  # always, by all: a rank cannot know how far the others are
            facts = {"the model has weights": built, "they were shared before": self.broadcast_done}
            agree_on("the first weights", (), facts, _World)
        if self.broadcast_done:
            return
        if not built:
            when_built(self.model, self._share)
            return
        optimizer = self.model.optimizer
        if optimizer is not None and not optimizer.built and self.model.trainable_variables:
            optimizer.build(self.model.trainable_variables)
        self._share()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if not self.broadcast_done:
            self._share()

    def _share(self) -> None:
        optimizer = self.model.optimizer
        state = [] if optimizer is None else common_state(optimizer)
        chosen = [
            v for v in [*model_state(self.model), *state] if id(v) not in self._local and id(v.value) not in self._local
        ]
        if verbs.world().size > 1:
            agree_on("the model and its optimizer", chosen, {"optimizer": type(optimizer).__name__}, _World)
            broadcast_variables(chosen, self.root_rank)
        self.broadcast_done = True


class MetricAverageCallback(keras.callbacks.Callback):
    """Replace the metrics of an epoch, validation included, by their averages over ranks.

    They are replaced in place: callbacks that come later in the list see the averages. A metric that is
    not a number on one rank is not a number on all. Ranks with different metrics get a ``DesyncError``.

    Args:
        device: accepted as Horovod does.
    """

    def __init__(self, device: str = "") -> None:
        super().__init__()
        self.device = device

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if verbs.world().size == 1:
            return
        logs = {} if logs is None else logs
        names = sorted(name for name, value in logs.items() if np.ndim(value) == 0)
        own = np.array([float(logs[name]) for name in names], np.float64)  # [metrics]
        agree_on("the metrics of the epoch", (), {"metrics": ", ".join(names)}, _World)  # also where there are none
        everyone = verbs.control().allgather(own.tobytes())
        average = np.mean([np.frombuffer(data, np.float64) for data in everyone], axis=0)
        logs.update(zip(names, average.tolist(), strict=True))
