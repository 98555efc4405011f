"""Joining the job from PyTorch: ``init``, ``shutdown`` and the world in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import horovod.torch as _horovod
import numpy as np
import torch

from hvdscale.runtime.session import Membership, join, prepare
from hvdscale.runtime.transport import RankSet
from hvdscale.torch.handles import forget_all
from hvdscale.torch.host import settle_way
from hvdscale.torch.unnamed import count_anew, name_the_unnamed

__all__ = ["control", "elastic", "init", "runtime_settings", "shutdown", "world"]

_membership = Membership()
world = _membership.world
runtime_settings = _membership.runtime_settings
control = _membership.control


def init(comm: Any = None, process_sets: Sequence[Any] | str | None = None) -> None:
    """Join the job. Call it once, before anything else of this module.

    Settings the user has not chosen are put in force first; ``runtime_settings()`` lists them.

    Args:
        comm: ranks of the job to use (a list), an mpi4py communicator, or ``None`` for all.
        process_sets: process sets to create now, or ``"dynamic"`` to add them later.

    Raises:
        WorldError: the launch variables do not fit together, or Horovod sees another world size.
    """
    preparation = prepare()
    if 0 < preparation.threads < torch.get_num_threads():
        torch.set_num_threads(preparation.threads)
    name_the_unnamed()
    count_anew()
    _horovod.init(comm, process_sets)
    joined = join(preparation, _horovod, _gather, comm)
    way = settle_way(_horovod, joined.transport)
    _membership.enter(replace(joined, settings=(*joined.settings, *way)))


def shutdown() -> None:
    """Leave the job. ``init()`` may be called again."""
    _membership.leave()
    _horovod.shutdown()
    forget_all()


def elastic() -> bool:
    """Whether ranks may come and go in this job (``horovodrun --min-np``)."""
    return world().launch.elastic


def _gather(vector: np.ndarray, process_set: RankSet | None) -> np.ndarray:
    return _horovod.allgather(
        torch.from_numpy(vector.copy()),
        name="hvdscale.control",
        process_set=process_set or _horovod.global_process_set,
    ).numpy()
