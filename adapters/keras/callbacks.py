"""Callbacks for ``fit``: every public name of ``horovod.keras.callbacks``, and ours."""

from hvdscale.keras.agreement_callbacks import BroadcastGlobalVariablesCallback, MetricAverageCallback
from hvdscale.keras.best_model import BestModelCheckpoint
from hvdscale.keras.learning_rate import LearningRateScheduleCallback, LearningRateWarmupCallback
from hvdscale.keras.metrics_callback import SyncMetricsCallback

__all__ = [
    "BestModelCheckpoint",
    "BroadcastGlobalVariablesCallback",
    "LearningRateScheduleCallback",
    "LearningRateWarmupCallback",
    "MetricAverageCallback",
    "SyncMetricsCallback",
]
