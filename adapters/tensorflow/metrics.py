"""The metrics of ``optimizer.sync`` in TensorBoard."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from hvdscale.sync.scalars import scalars, steps_so_far

__all__ = ["open_writer", "write_metrics"]


def write_metrics(writer: Any, optimizer: Any, step: int | None = None) -> None:
    """Write ``sync/rounds``, ``sync/bytes_sent``, ``sync/drift`` and the others as scalars; outside a graph.

    Args:
        writer: of ``tf.summary.create_file_writer``, or ``None`` on ranks that do not write.
        optimizer: distributed; agreeing at every step in float32 it has nothing to write.
        step: where on the axis; left out: the optimizer's steps so far.
    """
    metrics = optimizer.sync.metrics()
    if writer is None or not metrics:
        return
    at = steps_so_far(metrics) if step is None else step
    with writer.as_default():
        for tag, value in scalars(metrics).items():
            tf.summary.scalar(tag, value, step=at)


def open_writer(folder: str) -> Any:
    """A writer of ``tf.summary`` for ``folder``."""
    return tf.summary.create_file_writer(folder)
