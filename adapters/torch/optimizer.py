"""Horovod's ``optimizer`` module."""

from hvdscale.torch.sync import DistributedOptimizer

__all__ = ["DistributedOptimizer"]
