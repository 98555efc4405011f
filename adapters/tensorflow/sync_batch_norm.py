"""``horovod.tensorflow.sync_batch_norm``, where scripts look for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hvdscale.tensorflow.keras import SyncBatchNormalization

__all__ = ["SyncBatchNormalization"]


def __getattr__(name: str) -> Any:
    """The layer comes from the Keras adapter, which imports this one."""
    if name == "SyncBatchNormalization":
        from hvdscale.tensorflow.keras import SyncBatchNormalization

        return SyncBatchNormalization
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
