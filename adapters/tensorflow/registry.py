"""The variables of a call, in words every rank must agree on before the first tensor moves."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf
from horovod.tensorflow.mpi_ops import ProcessSet, global_process_set

from hvdscale._version import __version__
from hvdscale.runtime.agreement import Fingerprint, agree
from hvdscale.tensorflow.messages import exchanges
from hvdscale.tensorflow.runtime import control, world

__all__ = ["agree_on", "can_compare", "describe", "stable_name"]

# Keras numbers layers of a class in order of creation: "dense_1" is "dense" where one model less was built.
# An optimizer's "sgd/sequential_2_dense_1_kernel_momentum" holds such names in the middle.
_AUTOMATIC_NUMBER = re.compile(r"_\d+(?=[/_]|$)")


def stable_name(variable: Any) -> str:
    """The name of a variable without what depends on how many others this process made before."""
    name = getattr(variable, "path", None) or getattr(variable, "name", None) or "tensor"
    return _AUTOMATIC_NUMBER.sub("", str(name).split(":")[0])


def describe(variable: Any) -> tuple[str, tuple[int, ...], str]:
    """``(name, shape, dtype)`` of a variable or tensor; unknown lengths are -1."""
    shape = tf.TensorShape(variable.shape)
    lengths = () if shape.rank is None else tuple(-1 if n is None else n for n in shape)
    return stable_name(variable), lengths, tf.as_dtype(variable.dtype).name


def can_compare(process_set: ProcessSet = global_process_set) -> bool:
    """Whether ranks of ``process_set`` meet here to compare what they hold.

    In an elastic job they do not while a graph is built: ranks that stay do not build it again when others join.
    """
    return exchanges(process_set) and (tf.executing_eagerly() or not world().launch.elastic)


def agree_on(
    tensors: Sequence[tuple[str, tuple[int, ...], str]],
    facts: Mapping[str, object],
    about: str,
    process_set: ProcessSet = global_process_set,
) -> None:
    """Check that all ranks of ``process_set`` are about to exchange the same tensors, where they ``can_compare``.

    Raises:
        DesyncError: on every rank, naming the ranks and the first difference.
    """
    if not can_compare(process_set):
        return
    versions = {"hvdscale": __version__, "tensorflow": tf.__version__}
    agree(Fingerprint.of(tensors, {**versions, **facts}), control(process_set), about)
