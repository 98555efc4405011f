"""The same model and optimizer on every rank: compared by digest, and copied from one rank to all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from hvdscale._version import __version__
from hvdscale.keras import backend
from hvdscale.keras.backend import verbs
from hvdscale.runtime.agreement import Fingerprint, agree
from hvdscale.runtime.horovod import installed_version

__all__ = ["agree_on", "broadcast_variables", "model_state", "path_of"]

_CHUNK_BYTES = 1 << 28  # one message stays far below the 2 GiB an MPI count can say
_COUNTER = re.compile(r"_\d+(?=[/_]|$)")


def path_of(variable: Any) -> str:
    """The variable's path without Keras's automatic counters.

    A model built on one rank only (for evaluation, say) moves the counters there, not what is exchanged.
    """
    return _COUNTER.sub("", str(getattr(variable, "path", None) or getattr(variable, "name", "variable")))


def model_state(model: Any) -> list[Any]:
    """The model's variables that must agree: all weights, trained or not (batch statistics among them).

    Seed generators stay out: dropout must differ from rank to rank.
    """
    return list(model.weights)


def agree_on(
    about: str,
    variables: Sequence[Any],
    facts: Mapping[str, object],
    process_set: Any,
) -> None:
    """Compare variables (path, shape, dtype, order), facts and versions over the ranks of ``process_set``.

    Raises:
        DesyncError: on every rank, with the same text.
    """
    versions = {
        "hvdscale": __version__,
        "Keras": keras.__version__,
        f"Keras backend {backend.NAME}": installed_version(backend.NAME),
    }
    tensors = [(path_of(v), tuple(v.shape), str(v.dtype)) for v in variables]
    agree(Fingerprint.of(tensors, {**versions, **facts}), verbs.control(process_set), about)


def broadcast_variables(
    variables: Iterable[Any], root_rank: int = 0, process_set: Any = verbs.hvd.global_process_set
) -> None:
    """Copy the values of Keras variables (or tensors' variables) from ``root_rank`` to all ranks, in place.

    They travel as bytes, in messages of at most 256 MiB: any dtype, no rounding.

    Raises:
        DesyncError: on every rank, when ranks hold other variables or name another root.
    """
    variables = list(variables)
    if not process_set.included() or process_set.size() == 1:
        return
    agree_on("the variables to broadcast", variables, {"root_rank": root_rank}, process_set)
    if not variables:
        return
    with verbs.eager():
        arrays = [np.asarray(keras.ops.convert_to_numpy(v)) for v in variables]
        data = np.frombuffer(b"".join(a.tobytes() for a in arrays), np.uint8)  # [bytes of all]
        pieces = [data[at : at + _CHUNK_BYTES] for at in range(0, len(data), _CHUNK_BYTES)]
        received = b"".join(
            verbs.broadcast_bytes(piece, root_rank, process_set, f"hvdscale.keras.variables.{i}").tobytes()
            for i, piece in enumerate(pieces)
        )
        offset = 0
        for variable, array in zip(variables, arrays, strict=True):
            value = np.frombuffer(received, array.dtype, array.size, offset).reshape(array.shape)
            variable.assign(value)
            offset += array.nbytes
