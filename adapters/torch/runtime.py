"""Joining the job from PyTorch: ``init``, ``shutdown`` and the world in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import horovod.torch as _horovod
import numpy as np
import torch

from hvdscale.errors import WorldError
from hvdscale.runtime.session import World, join, prepare
from hvdscale.runtime.settings import Setting
from hvdscale.runtime.transport import RankSet, Transport

__all__ = ["control", "elastic", "init", "runtime_settings", "shutdown", "world"]

_world: World | None = None


def init(comm: Any = None, process_sets: Sequence[Any] | str | None = None) -> None:
    """Join the job. Call it once, before anything else of this module.

    Settings the user has not chosen are put in force first; ``runtime_settings()`` lists them.

    Args:
        comm: ranks of the job to use (a list), an mpi4py communicator, or ``None`` for all.
        process_sets: process sets to create now, or ``"dynamic"`` to add them later.

    Raises:
        WorldError: the launch variables do not fit together, or Horovod sees another world size.
    """
    global _world
    preparation = prepare()
    if 0 < preparation.threads < torch.get_num_threads():
        torch.set_num_threads(preparation.threads)
    _horovod.init(comm, process_sets)
    _world = join(preparation, _horovod, _gather, comm)


def shutdown() -> None:
    """Leave the job. ``init()`` may be called again."""
    global _world
    _world = None
    _horovod.shutdown()


def world() -> World:
    """The world since ``init()``.

    Raises:
        WorldError: before ``init()`` or after ``shutdown()``.
    """
    if _world is None:
        raise WorldError("hvdscale is not initialised. Call hvd.init() first.")
    return _world


def runtime_settings() -> tuple[Setting, ...]:
    """Every transport and thread setting ``init()`` looked at: name, value, reason and who chose it."""
    return world().settings


def control(process_set: RankSet | None = None) -> Transport:
    """The transport of small control messages among ``process_set`` (default: all ranks)."""
    transport = world().transport
    return transport if process_set is None else transport.subset(process_set)


def elastic() -> bool:
    """Whether ranks may come and go in this job (``horovodrun --min-np``)."""
    return world().launch.elastic


def _gather(vector: np.ndarray, process_set: RankSet | None) -> np.ndarray:
    return _horovod.allgather(
        torch.from_numpy(vector.copy()),
        name="hvdscale.control",
        process_set=process_set or _horovod.global_process_set,
    ).numpy()
