"""Every public name of ``horovod.tensorflow.keras.callbacks``."""

from __future__ import annotations

from typing import Any

from hvdscale.keras import callbacks as _common
from hvdscale.keras.callbacks import (
    BroadcastGlobalVariablesCallback,
    LearningRateScheduleCallback,
    LearningRateWarmupCallback,
    MetricAverageCallback,
    SyncMetricsCallback,
)

__all__ = [
    "BestModelCheckpoint",
    "BroadcastGlobalVariablesCallback",
    "LearningRateScheduleCallback",
    "LearningRateWarmupCallback",
    "MetricAverageCallback",
    "SyncMetricsCallback",
]


class BestModelCheckpoint(_common.BestModelCheckpoint):
    """``hvdscale.keras.callbacks.BestModelCheckpoint`` with the argument order of ``horovod.tensorflow.keras``."""

    def __init__(
        self,
        monitor: str = "val_loss",
        verbose: int = 0,
        save_weights_only: bool = False,
        mode: str = "auto",
        save_freq: str | int = "epoch",
        *,
        filepath: Any = None,
    ) -> None:
        super().__init__(monitor, verbose, mode, save_freq, save_weights_only=save_weights_only, filepath=filepath)
