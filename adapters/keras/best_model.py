"""``BestModelCheckpoint``: ranks agree on which epoch was the best, and the first one saves it."""

from __future__ import annotations

import os
from typing import Any

import keras
import numpy as np

from hvdscale.errors import PlanError
from hvdscale.keras.backend import verbs

__all__ = ["BestModelCheckpoint"]


class BestModelCheckpoint(keras.callbacks.ModelCheckpoint):
    """Save the model where the monitored metric, averaged over ranks, is the best so far.

    Only rank 0 writes; the others wait until the file is there. The file holds the plain optimizer.

    Args:
        monitor: name of the metric.
        verbose: 1 prints a line on rank 0.
        mode: ``"min"``, ``"max"`` or ``"auto"``.
        save_freq: ``"epoch"`` or a number of batches.
        save_weights_only: write a ``.weights.h5`` file instead of the model.
        filepath: where to; may be set later as ``callback.filepath``. It ends with ``.keras``, ``.h5`` or
            ``.weights.h5``.

    Raises:
        PlanError: when training begins, if there is no ``filepath``.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        verbose: int = 0,
        mode: str = "auto",
        save_freq: str | int = "epoch",
        *,
        save_weights_only: bool = False,
        filepath: str | os.PathLike[str] | None = None,
    ) -> None:
        suffix = ".weights.h5" if save_weights_only else ".keras"
        super().__init__(
            filepath=f"unnamed{suffix}" if filepath is None else filepath,
            monitor=monitor,
            verbose=verbose,
            save_best_only=True,
            save_weights_only=save_weights_only,
            mode=mode,
            save_freq=save_freq,
        )
        if filepath is None:
            self.filepath: str | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        if self.filepath is None:
            raise PlanError("BestModelCheckpoint has no file to write. Pass filepath=, or set callback.filepath.")
        super().on_train_begin(logs)
        if verbs.world().rank != 0:
            self.verbose = 0

    def _save_model(self, epoch: int, batch: int | None, logs: Any) -> None:
        world = verbs.world()
        logs = dict(logs or {})
        known = np.ndim(logs.get(self.monitor, ())) == 0
        everyone = world.transport.allgather(np.float64(logs[self.monitor]).tobytes() if known else b"")
        if all(everyone):
            logs[self.monitor] = float(np.mean([np.frombuffer(data, np.float64) for data in everyone]))
        else:
            logs.pop(self.monitor, None)  # unknown on one rank is unknown: Keras warns, and saves
        if world.rank == 0:
            super()._save_model(epoch, batch, logs)
        else:
            self._should_save_model(epoch, batch, logs, self.filepath)
        world.transport.allgather(b"")  # nobody goes on before the file is there
