"""Horovod's ``sync_batch_norm`` module."""

from hvdscale.torch.batch_norm import SyncBatchNorm

__all__ = ["SyncBatchNorm"]
