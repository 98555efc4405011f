"""The metrics of rounds reach TensorBoard, from every framework with the same call."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util.tensor_util import make_ndarray

from hvdscale.sync import EveryStep, LocalSGD
from hvdscale.sync.handle import SteadySync
from tests.contract.conftest import ADAPTER
from tests.contract.driver import ContractDriver
from tests.contract.oracle import batches, initial_weights


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """By tag and step."""
    found: dict[str, dict[int, float]] = {}
    for file in folder.glob("events.out.tfevents.*"):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                # The loader turns scalars of the old form into tensors, too.
                found.setdefault(value.tag, {})[event.step] = float(make_ndarray(value.tensor))
    return found


def open_writer(folder: Path) -> Any:
    if ADAPTER == "keras":
        from hvdscale.keras.backend import verbs

        return verbs.open_writer(str(folder))
    return importlib.import_module(f"hvdscale.{ADAPTER}.metrics").open_writer(str(folder))


def test_metrics_become_scalars(driver: ContractDriver, rank: int, size: int, tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    model = driver.model(initial_weights())
    optimizer = driver.distribute(driver.optimizer("sgd", model), model, sync=LocalSGD(2))
    for batch in batches(5, rank):
        driver.train(model, optimizer, [batch])
        driver.hvd.write_metrics(writer if rank == 0 else None, optimizer)
    driver.hvd.write_metrics(writer, optimizer, step=100)
    writer.flush()
    written = scalars(tmp_path)
    assert "sync/loss" not in written  # nobody told it
    rounds = {1: 0.0, 2: 1.0, 3: 1.0, 4: 2.0, 5: 2.0} if rank == 0 else {}
    assert written["sync/rounds"] == {**rounds, 100: 2.0}
    metrics = optimizer.sync.metrics()
    for name in ("bytes_sent", "drift", "seconds"):
        assert written[f"sync/{name}"][100] == np.float32(metrics[name])


def test_coded_gradients_count_a_round_a_step(driver: ContractDriver, rank: int, size: int, tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    model = driver.model(initial_weights())
    optimizer = driver.distribute(driver.optimizer("sgd", model), model, sync=EveryStep(wire="int8"))
    driver.train(model, optimizer, batches(3, rank))
    driver.hvd.write_metrics(writer, optimizer)
    writer.flush()
    rounds = 3 if size > 1 else 0  # alone, nothing travels
    assert scalars(tmp_path)["sync/rounds"] == {rounds: float(rounds)}


def test_agreement_at_every_step_has_none(driver: ContractDriver) -> None:
    steady = SimpleNamespace(sync=SteadySync[Any](dict))
    driver.hvd.write_metrics(object(), steady)  # a writer that is never asked for anything
