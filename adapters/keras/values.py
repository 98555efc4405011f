"""Collectives on single values: numbers, NumPy arrays, backend tensors and Keras variables."""

from __future__ import annotations

from typing import Any

import keras

from hvdscale.errors import PlanError
from hvdscale.keras.backend import verbs
from hvdscale.keras.placed_state import common_state
from hvdscale.keras.replicas import broadcast_variables, model_state

__all__ = ["allgather", "allreduce", "broadcast", "broadcast_global_variables", "reducescatter"]

Compression = verbs.hvd.Compression
Average = verbs.hvd.Average
Sum = verbs.hvd.Sum
global_process_set = verbs.hvd.global_process_set


def allreduce(
    value: Any,
    name: str | None = None,
    average: bool | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    op: Any = None,
    compression: Any = Compression.none,
    *,
    process_set: Any = global_process_set,
) -> Any:
    """The average of ``value`` over ranks, as a backend tensor of its shape and dtype.

    Args:
        value: a number, array, tensor or Keras variable of the same shape on every rank.
        name: name of the message; the same on every rank.
        average: Horovod's older argument: ``True`` is ``op=Average``, ``False`` is ``op=Sum``.
        prescale_factor, postscale_factor: factors before and after the sum.
        op: ``Average`` (the default), ``Sum``, ``Min``, ``Max``, ``Product`` or ``Adasum``.
        compression: ``Compression.none`` or ``Compression.fp16``.
        process_set: ranks that take part.

    Raises:
        PlanError: both ``average`` and ``op`` are given.
    """
    if average is not None and op is not None:
        raise PlanError(f"op and average say the same thing; got op={op} and average={average}. Give op only.")
    chosen = (Sum if average is False else Average) if op is None else op
    return verbs.hvd.allreduce(
        verbs.tensor(value),
        name=name,
        op=chosen,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
        compression=compression,
        process_set=process_set,
    )


def allgather(value: Any, name: str | None = None, *, process_set: Any = global_process_set) -> Any:
    """``value`` of all ranks in rank order, joined along the first axis, which may differ in length.

    A number counts as an array of one element.
    """
    tensor = verbs.tensor(value)
    if len(tensor.shape) == 0:
        tensor = keras.ops.reshape(tensor, (1,))
    return verbs.hvd.allgather(tensor, name=name, process_set=process_set)


def broadcast(value: Any, root_rank: int, name: str | None = None, *, process_set: Any = global_process_set) -> Any:
    """``value`` of ``root_rank`` (counted over all ranks), as a backend tensor; the same shape on every rank."""
    return verbs.hvd.broadcast(verbs.tensor(value), root_rank, name=name, process_set=process_set)


def reducescatter(
    value: Any, name: str | None = None, op: Any = Average, *, process_set: Any = global_process_set
) -> Any:
    """The average (or sum) of ``value`` over ranks, of which this rank gets its slice of the first axis."""
    return verbs.hvd.reducescatter(verbs.tensor(value), name=name, op=op, process_set=process_set)


def broadcast_global_variables(root_rank: int, model: Any = None) -> None:
    """Copy a model's weights and its optimizer's state from ``root_rank`` to all ranks.

    Keras 3 keeps no list of all variables, so the model must be named.

    Args:
        root_rank: the rank whose values everyone gets.
        model: a built model. Horovod's one-argument call has no meaning in Keras 3.

    Raises:
        PlanError: no model, or one that is not built.
    """
    if model is None:
        raise PlanError(
            "Keras 3 keeps no list of all variables. Call hvd.broadcast_global_variables(root_rank, model=model), "
            "or pass DistributedOptimizer(..., model=model), or use callbacks.BroadcastGlobalVariablesCallback(0)."
        )
    if not model.built:
        raise PlanError(f"Model {model.name!r} has no variables yet. Build it, or call it on one batch, first.")
    optimizer = getattr(model, "optimizer", None)
    state = common_state(optimizer) if optimizer is not None else []
    broadcast_variables([*model_state(model), *state], root_rank)
