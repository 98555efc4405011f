"""``SyncMetricsCallback``: what rounds cost and do, in the logs of ``fit`` and in TensorBoard."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest

from hvdscale.sync import LocalSGD
from tests.contract.driver import ContractDriver
from tests.contract.keras_reference import network, own_batches
from tests.contract.oracle import initial_weights
from tests.contract.test_relaxed_metrics import scalars


@pytest.mark.parametrize("scaled", [False, True])
def test_rounds_in_the_logs_and_in_tensorboard(driver: ContractDriver, rank: int, tmp_path: Path, scaled: bool) -> None:
    """Also where Keras scales the loss, and the optimizer that knows of rounds is inside its own."""
    hvd = driver.hvd
    model = network(initial_weights())
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), model=model, sync=LocalSGD(2))
    model.compile(keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=1.0) if scaled else optimizer, "mse")
    x, y = (np.concatenate(parts) for parts in zip(*own_batches(5), strict=True))
    watch = hvd.callbacks.SyncMetricsCallback(tmp_path / "logs")
    history = model.fit(x, y, batch_size=8, shuffle=False, verbose=0, epochs=2, callbacks=[watch]).history
    assert history["sync/rounds"] == [2, 5]
    assert history["sync/bytes_sent"][1] == optimizer.sync.metrics()["bytes_sent"]
    assert (tmp_path / "logs").exists() == (rank == 0)
    if rank == 0:
        rounds = scalars(tmp_path / "logs")["sync/rounds"]
        assert rounds == {2: 1, 4: 2, 6: 3, 8: 4, 10: 5}


def test_without_rounds_the_logs_are_as_they_were(driver: ContractDriver) -> None:
    model = network(initial_weights())
    model.compile(driver.hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), model=model), "mse")
    x, y = own_batches(1)[0]
    watch = driver.hvd.callbacks.SyncMetricsCallback()
    assert set(model.fit(x, y, verbose=0, callbacks=[watch]).history) == {"loss"}
