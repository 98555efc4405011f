"""Joining the job from TensorFlow: ``init``, ``shutdown`` and the world in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import horovod.tensorflow as _horovod
import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context as _eager

from hvdscale.runtime.session import Membership, join, prepare
from hvdscale.runtime.settings import Setting
from hvdscale.runtime.transport import RankSet

__all__ = ["control", "init", "runtime_settings", "shutdown", "world"]

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
    # TensorFlow reads its thread counts when its runtime starts, with the first operation.
    started = _eager.context()._initialized
    preparation = prepare()
    if started:
        settings = tuple(_late(s) for s in preparation.settings)
        preparation = replace(preparation, settings=settings)
    _horovod.init(comm, process_sets)
    _membership.enter(join(preparation, _horovod, _gather, comm))


def shutdown() -> None:
    """Leave the job. ``init()`` may be called again."""
    _membership.leave()
    _horovod.shutdown()


def _gather(vector: np.ndarray, process_set: RankSet | None) -> np.ndarray:
    with _eager.eager_mode():  # also while a tf.function is traced or a TensorFlow 1 graph is built
        return _horovod.allgather(
            tf.constant(vector),
            name="hvdscale.control",
            process_set=process_set or _horovod.global_process_set,
        ).numpy()


def _late(setting: Setting) -> Setting:
    if not setting.name.startswith("TF_NUM_") or setting.origin != "hvdscale":
        return setting
    reason = f"TensorFlow had already run an operation when init() was called; call init() first. {setting.reason}"
    return replace(setting, reason=reason, origin="late")
