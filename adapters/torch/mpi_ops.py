"""Horovod's ``mpi_ops`` module: the world, the collectives made right, and their autograd functions."""

from horovod.torch.mpi_ops import (
    HorovodAllgather,
    HorovodAllreduce,
    HorovodAlltoall,
    HorovodBroadcast,
    HorovodGroupedAllgather,
    HorovodGroupedAllreduce,
    HorovodGroupedReducescatter,
    HorovodReducescatter,
)

from hvdscale.torch import common
from hvdscale.torch.common import *  # noqa: F403

__all__ = [
    *common.__all__,
    "HorovodAllgather",
    "HorovodAllreduce",
    "HorovodAlltoall",
    "HorovodBroadcast",
    "HorovodGroupedAllgather",
    "HorovodGroupedAllreduce",
    "HorovodGroupedReducescatter",
    "HorovodReducescatter",
]
