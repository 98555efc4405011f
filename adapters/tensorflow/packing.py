"""Variables of any dtype packed as bytes into few messages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from horovod.tensorflow import mpi_ops as _ops
from horovod.tensorflow.mpi_ops import ProcessSet

from hvdscale.tensorflow.collectives import broadcast

__all__ = ["MESSAGE_BYTES", "broadcast_packed"]

# Variables share a message up to this size; a larger one travels alone, without a copy.
MESSAGE_BYTES = 64 * 2**20

# What ``broadcast`` can send without packing.
_SENDABLE = (
    *(tf.float16, tf.bfloat16, tf.float32, tf.float64, tf.bool),
    *(tf.uint8, tf.int8, tf.uint16, tf.int16, tf.int32, tf.int64),
)


def broadcast_packed(variables: list[tf.Variable], root_rank: int, process_set: ProcessSet) -> list[Any]:
    """Assign the values on ``root_rank``, bit for bit; returns the assignments."""
    assigned: list[Any] = []
    for number, message in enumerate(_messages(variables)):
        name = f"broadcast_variables_{number}"
        if len(message) == 1 and not _packable(message[0]):
            received = [broadcast(message[0], root_rank, name, process_set=process_set)]
        else:
            data = tf.concat([_to_bytes(v) for v in message], 0)  # uint8[sum of bytes]
            data = _ops.broadcast(data, root_rank, name, process_set=process_set)
            pieces = tf.split(data, [_size_bytes(v) for v in message])
            received = [_from_bytes(piece, v) for piece, v in zip(pieces, message, strict=True)]
        assigned += [v.assign(value) for v, value in zip(message, received, strict=True)]
    return assigned


def _messages(variables: list[tf.Variable]) -> Iterator[list[tf.Variable]]:
    message: list[tf.Variable] = []
    filled = 0
    for variable in variables:
        size = _size_bytes(variable) if _packable(variable) else MESSAGE_BYTES
        if message and filled + size > MESSAGE_BYTES:
            yield message
            message, filled = [], 0
        message.append(variable)
        filled += size
    if message:
        yield message


def _packable(variable: tf.Variable) -> bool:
    """Whether it shares a message: its size is known and not large, or Horovod has no other way for its dtype."""
    if not variable.shape.is_fully_defined():
        return False
    return _size_bytes(variable) < MESSAGE_BYTES or variable.dtype not in _SENDABLE


def _size_bytes(variable: tf.Variable) -> int:
    return variable.shape.num_elements() * variable.dtype.size


def _to_bytes(variable: tf.Variable) -> tf.Tensor:
    value = tf.reshape(tf.convert_to_tensor(variable), [-1])
    # bitcast to a smaller type adds an axis: [n] -> [n, bytes of one value]
    value = tf.cast(value, tf.uint8) if value.dtype == tf.bool else tf.bitcast(value, tf.uint8)
    return tf.reshape(value, [-1])


def _from_bytes(data: tf.Tensor, variable: tf.Variable) -> tf.Tensor:
    if variable.dtype == tf.bool:
        return tf.reshape(tf.cast(data, tf.bool), variable.shape)
    width = variable.dtype.size
    data = tf.reshape(data, [*variable.shape, width] if width > 1 else variable.shape)
    return tf.bitcast(data, variable.dtype)
