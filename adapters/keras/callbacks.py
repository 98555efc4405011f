"""Callbacks for ``fit``: every public name of ``horovod.keras.callbacks``."""

from hvdscale.keras.callbacks_state import BroadcastGlobalVariablesCallback, MetricAverageCallback

__all__ = ["BroadcastGlobalVariablesCallback", "MetricAverageCallback"]
