"""The ranks that meet in rounds, and how their buffers travel: mpi4py, or Horovod where there is no MPI."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import horovod.torch as _horovod
import numpy as np
import torch
from horovod.torch import ProcessSet, global_process_set

from hvdscale.errors import PlanError
from hvdscale.runtime.channel import Channel, HorovodChannel, MPIChannel, SoloChannel
from hvdscale.runtime.post import Post
from hvdscale.runtime.post import open_post as _open_post
from hvdscale.runtime.transport import MPITransport, SoloTransport
from hvdscale.torch.handles import wait
from hvdscale.torch.process_sets import intern
from hvdscale.torch.runtime import control

__all__ = ["open_channel", "open_post"]

_numbers = itertools.count()  # channels are opened in the same order on every rank


def open_channel(process_set: ProcessSet = global_process_set, patient: bool = False) -> Channel:
    """A channel of its own among ``process_set``; called by exactly those ranks. Collective.

    ``patient``: for a thread beside the training step.
    """
    transport = control(process_set)
    if isinstance(transport, SoloTransport) or process_set.size() == 1:
        return SoloChannel()
    if isinstance(transport, MPITransport):
        return MPIChannel(transport, patient)
    return _over_horovod(process_set, next(_numbers))


def open_post(process_set: ProcessSet = global_process_set) -> Post:
    """A post of its own among ``process_set``; called by exactly those ranks. Collective."""
    return _open_post(control(process_set))


def _over_horovod(process_set: ProcessSet, number: int) -> Channel:
    def add(values: np.ndarray, name: str) -> np.ndarray:
        handle = _horovod.allreduce_async_(
            torch.from_numpy(values), name=name, op=_horovod.Sum, process_set=process_set
        )
        return wait(handle).numpy()

    def gather(data: np.ndarray, name: str) -> np.ndarray:
        return _horovod.allgather(torch.from_numpy(data.copy()), name=name, process_set=process_set).numpy()

    def scatter(rows: np.ndarray, name: str) -> np.ndarray:
        return _horovod.alltoall(torch.from_numpy(rows.copy()), name=name, process_set=process_set).numpy()

    def narrow(groups: Sequence[Sequence[int]]) -> Channel | None:
        if process_set.size() < _horovod.size():
            raise PlanError(
                f"Groups inside a process set of {process_set.size()} of {_horovod.size()} ranks need MPI: without it, "
                "every rank of the job takes part in making process sets. Start with mpirun, or train on all ranks."
            )
        number = next(_numbers)  # also on a rank that is in no group
        mine = [made for made in intern(groups) if made.included()]
        if not mine:
            return None
        return SoloChannel() if mine[0].size() == 1 else _over_horovod(mine[0], number)

    ranks = tuple(process_set.ranks or range(_horovod.size()))
    prefix = f"hvdscale.channel.{number}"
    return HorovodChannel(
        process_set.rank(), ranks, add=add, gather=gather, scatter=scatter, prefix=prefix, narrow=narrow
    )
