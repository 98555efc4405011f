"""The metrics of ``optimizer.sync`` in TensorBoard."""

from __future__ import annotations

from typing import Any

from hvdscale.errors import PlanError
from hvdscale.sync.scalars import scalars, steps_so_far

__all__ = ["open_writer", "write_metrics"]


def write_metrics(writer: Any, optimizer: Any, step: int | None = None) -> None:
    """Write ``sync/rounds``, ``sync/bytes_sent``, ``sync/drift`` and the others as scalars.

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``, or ``None`` on ranks that do not write.
        optimizer: distributed; agreeing at every step in float32 it has nothing to write.
        step: where on the axis; left out: the optimizer's steps so far.
    """
    metrics = optimizer.sync.metrics()
    if writer is None or not metrics:
        return
    at = steps_so_far(metrics) if step is None else step
    for tag, value in scalars(metrics).items():
        writer.add_scalar(tag, value, at)


def open_writer(folder: str) -> Any:
    """A ``SummaryWriter`` for ``folder``.

    Raises:
        PlanError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise PlanError(
            f"Scalars are written with tensorboard ({error}). Install it: pip install 'hvdscale[viz]'"
        ) from None
    return SummaryWriter(folder)
