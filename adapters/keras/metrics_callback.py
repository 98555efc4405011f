"""A callback that shows what the agreement of ranks costs and does: rounds, bytes, drift."""

from __future__ import annotations

import os
from typing import Any

import keras

from hvdscale.keras.backend import verbs
from hvdscale.keras.keras_hooks import distributed_in
from hvdscale.sync.scalars import scalars

__all__ = ["SyncMetricsCallback"]


class SyncMetricsCallback(keras.callbacks.Callback):
    """Put the metrics of ``optimizer.sync`` into the logs of each epoch, and into TensorBoard after each round.

    In the logs they are called ``sync/rounds``, ``sync/bytes_sent``, ``sync/drift`` and so on; ``History`` and
    callbacks that come later see them. A plan that agrees at every step has none.

    Args:
        log_dir: where the first rank writes scalars for TensorBoard; left out: nowhere.

    Raises:
        PlanError: ``log_dir`` is given, and TensorBoard is not installed.
    """

    def __init__(self, log_dir: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        self._writer = verbs.open_writer(os.fspath(log_dir)) if log_dir and verbs.world().rank == 0 else None
        self._rounds = 0.0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._writer is not None:
            self._write()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if logs is not None:
            logs.update(scalars(self._metrics()))

    def on_train_end(self, logs: Any = None) -> None:
        if self._writer is not None:
            self._write()
            self._writer.flush()

    def _write(self) -> None:
        rounds = self._metrics().get("rounds", 0.0)
        if rounds > self._rounds:
            self._rounds = rounds
            verbs.write_metrics(self._writer, distributed_in(self.model.optimizer))

    def _metrics(self) -> dict[str, float]:
        distributed = distributed_in(self.model.optimizer)
        return {} if distributed is None else distributed.sync.metrics()
