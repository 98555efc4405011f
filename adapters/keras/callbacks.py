"""Callbacks for ``fit``: every public name of ``horovod.keras.callbacks``."""

from hvdscale.keras.agreement_callbacks import BroadcastGlobalVariablesCallback, MetricAverageCallback
from hvdscale.keras.best_model import BestModelCheckpoint
from hvdscale.keras.learning_rate import LearningRateScheduleCallback, LearningRateWarmupCallback

__all__ = [
    "BestModelCheckpoint",
    "BroadcastGlobalVariablesCallback",
    "LearningRateScheduleCallback",
    "LearningRateWarmupCallback",
    "MetricAverageCallback",
]
