"""A saved model holds the plain optimizer; ``load_model`` distributes it again, with its state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from hvdscale.errors import PlanError
from tests.contract import oracle
from tests.contract.driver import ContractDriver
from tests.contract.keras_reference import (
    all_batches,
    assert_close,
    assert_equal_everywhere,
    fit,
    network,
    own_batches,
    plain_weights,
    weights_of,
)

START = oracle.initial_weights()
Adam = keras.optimizers.Adam


class Halved(keras.optimizers.SGD):
    """An optimizer of the user's own, known to Keras by class only."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        super().update_step(gradient, variable, learning_rate / 2)


@keras.saving.register_keras_serializable("mine")
class Registered(Halved):
    """The same, registered."""


def _saved(driver: ContractDriver, path: Path, optimizer: Any) -> Any:
    model = network(START)
    fit(model, driver.hvd.DistributedOptimizer(optimizer), own_batches(2))
    model.save(path)  # every rank in its own folder
    return model


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_training_goes_on_where_it_stopped(driver: ContractDriver, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    model = _saved(driver, path, Adam(0.01))
    loaded = driver.hvd.load_model(path)
    with pytest.raises(PlanError, match="distributed already"):
        driver.hvd.DistributedOptimizer(loaded.optimizer)
    for ours, theirs in zip(loaded.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    assert int(loaded.optimizer.iterations) == 2
    fit(loaded, loaded.optimizer, own_batches(4)[2:])
    assert_close(weights_of(loaded), plain_weights(Adam(0.01), all_batches(4), START))
    assert_equal_everywhere(loaded.weights)


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_plain_keras_reads_it(driver: ContractDriver, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    model = _saved(driver, path, Adam(0.01))
    plain = keras.models.load_model(path)
    assert type(plain.optimizer) is type(Adam(0.01))
    driver.hvd.DistributedOptimizer(plain.optimizer)  # it was not distributed
    ours, theirs = model.optimizer.get_config(), plain.optimizer.get_config()
    assert ours == theirs


@pytest.mark.parametrize("kind", [Halved, Registered])
def test_optimizers_of_your_own(driver: ContractDriver, tmp_path: Path, kind: type) -> None:
    path = tmp_path / "model.keras"
    _saved(driver, path, kind(0.1))
    loaded = driver.hvd.load_model(path, custom_optimizers=[kind])
    assert isinstance(loaded.optimizer, kind)
    fit(loaded, loaded.optimizer, own_batches(3)[2:])
    assert_close(weights_of(loaded), plain_weights(keras.optimizers.SGD(0.05), all_batches(3), START))


def test_the_class_looks_like_the_plain_one(driver: ContractDriver) -> None:
    plain, ours = Adam(0.01, name="a"), driver.hvd.DistributedOptimizer(Adam(0.01, name="a"))
    assert isinstance(ours, keras.optimizers.Adam)
    assert keras.optimizers.serialize(ours) == keras.optimizers.serialize(plain)
    assert type(ours).__qualname__ == type(plain).__qualname__
    copy = type(ours).from_config(ours.get_config())
    assert type(copy) is type(plain)


def test_a_model_without_optimizer_comes_back_without(driver: ContractDriver, tmp_path: Path) -> None:
    network(START).save(tmp_path / "model.keras")
    loaded = driver.hvd.load_model(tmp_path / "model.keras")
    assert getattr(loaded, "optimizer", None) is None
    assert_close(weights_of(loaded), START, 1e-7)
