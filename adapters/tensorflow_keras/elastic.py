"""Every public name of ``horovod.tensorflow.keras.elastic``, and the state of ``horovod.tensorflow.elastic``."""

from __future__ import annotations

from typing import Any

from hvdscale.keras.elastic import (
    CommitStateCallback,
    KerasState,
    UpdateBatchStateCallback,
    UpdateEpochStateCallback,
    run,
)

__all__ = [
    "CommitStateCallback",
    "KerasState",
    "TensorFlowKerasState",
    "UpdateBatchStateCallback",
    "UpdateEpochStateCallback",
    "run",
]


class TensorFlowKerasState(KerasState):
    """``KerasState`` under its name in ``horovod.tensorflow.elastic``.

    Args:
        backend: accepted as Horovod does; TensorFlow 2 needs none.
    """

    def __init__(self, model: Any, optimizer: Any = None, backend: Any = None, **kwargs: Any) -> None:
        super().__init__(model, optimizer, **kwargs)
        self.backend = backend
