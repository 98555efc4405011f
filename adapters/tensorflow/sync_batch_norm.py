"""``horovod.tensorflow.sync_batch_norm``, where scripts look for it."""

from hvdscale.tensorflow.batch_norm import SyncBatchNormalization

__all__ = ["SyncBatchNormalization"]
