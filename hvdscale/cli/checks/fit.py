"""Keras ``fit`` really trains one model: ranks that start apart and read different data end with equal weights."""

from __future__ import annotations

import importlib
import json
from typing import Any

import numpy as np

from hvdscale.errors import DesyncError

__all__ = ["judge", "main"]

_STEPS = 12
_BATCH = 16
_FEATURES = 8


def main() -> None:
    """Train a small network through ``DistributedOptimizer`` and compare the weights over MPI, not over Horovod.

    Raises:
        DesyncError: weights differ between ranks, or did not move.
    """
    import keras

    hvd = importlib.import_module("hvdscale.keras")
    hvd.init()
    keras.utils.set_random_seed(hvd.rank())
    model = keras.Sequential([keras.Input((_FEATURES,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(1)])
    model.compile(optimizer=hvd.DistributedOptimizer(keras.optimizers.SGD(0.05, momentum=0.9)), loss="mse")
    start = _everyone(_flat(model))  # [ranks, weights]
    rng = np.random.default_rng(100 + hvd.rank())
    x = rng.normal(size=(_STEPS * _BATCH, _FEATURES)).astype(np.float32)
    y = rng.normal(loc=hvd.rank(), size=(_STEPS * _BATCH, 1)).astype(np.float32)
    model.fit(x, y, batch_size=_BATCH, verbose=0, callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)])
    end = _everyone(_flat(model))
    apart = float(np.abs(end - end[0]).max())
    moved = float(np.abs(end[0] - start[0]).max())
    judge(apart, moved, float(np.abs(start - start[0]).max()))
    if hvd.rank() == 0:
        says = f"{len(end)} ranks, {_STEPS} steps: weights moved by {moved:.2g}, differ by {apart:.1g}"
        print(json.dumps({"says": f"{keras.backend.backend()}: {says}"}), flush=True)
    hvd.shutdown()


def judge(apart: float, moved: float, apart_at_start: float) -> None:
    """Whether training moved the weights and brought ranks together, from the largest absolute differences.

    Raises:
        DesyncError: it did not.
    """
    if apart_at_start == 0.0:
        raise DesyncError("Ranks started from equal weights, so this check would prove nothing; seeds are ignored.")
    if not moved >= 1e-3:
        raise DesyncError(f"No weight moved by more than {moved:.1g} in {_STEPS} steps: fit applied no gradients.")
    if not apart <= 1e-6:  # also true of NaN
        raise DesyncError(
            f"After {_STEPS} steps of fit, weights of the ranks differ by {apart:.2g}: gradients were not averaged."
        )


def _flat(model: Any) -> np.ndarray:
    return np.concatenate([np.ravel(w).astype(np.float64) for w in model.get_weights()])


def _everyone(mine: np.ndarray) -> np.ndarray:
    """Every rank's vector: ``[weights] -> [ranks, weights]``."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    everyone = np.empty((world.size, mine.size), mine.dtype)
    world.Allgather([mine, MPI.BYTE], [everyone, MPI.BYTE])
    return everyone


if __name__ == "__main__":
    main()
