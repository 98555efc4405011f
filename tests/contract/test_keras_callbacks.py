"""The callbacks of ``fit``, each by what it promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from hvdscale.errors import DesyncError, PlanError
from hvdscale.runtime.transport import broadcast
from tests.contract import oracle
from tests.contract.driver import ContractDriver
from tests.contract.keras_reference import (
    assert_close,
    assert_differs_somewhere,
    assert_equal_everywhere,
    fit,
    network,
    own_batches,
    weights_of,
)

START = oracle.initial_weights()
SGD, Adam = keras.optimizers.SGD, keras.optimizers.Adam


class Recorder(keras.callbacks.Callback):
    """What a callback at this place of the list sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first_weights: Any = None
        self.rates: list[float] = []
        self.velocities: list[np.ndarray] = []
        self.logs: list[dict[str, float]] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self.first_weights is None and self.model.built:
            self.first_weights = weights_of(self.model)
        optimizer = self.model.optimizer
        self.rates.append(float(keras.ops.convert_to_numpy(optimizer.learning_rate)))
        if getattr(optimizer, "momentums", None):
            self.velocities.append(np.array(keras.ops.convert_to_numpy(optimizer.momentums[0])))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.logs.append(dict(logs))


def train(model: Any, optimizer: Any, callbacks: list[Any], epochs: int = 1, steps: int = 4, **arguments: Any) -> Any:
    model.compile(optimizer, "mse")
    x, y = (np.concatenate(parts) for parts in zip(*own_batches(steps), strict=True))
    return model.fit(x, y, batch_size=8, shuffle=False, verbose=0, epochs=epochs, callbacks=callbacks, **arguments)


@pytest.fixture
def shared_folder(driver: ContractDriver, tmp_path: Path) -> Path:
    """The first rank's folder, on every rank."""
    return Path(broadcast(driver.hvd.world().transport, str(tmp_path).encode()).decode())


@pytest.mark.parametrize("root", [0, -1])
def test_broadcast_before_the_first_step(driver: ContractDriver, root: int) -> None:
    root %= driver.hvd.size()
    model, recorder = network(), Recorder()
    optimizer = Adam(0.01 * (1 + driver.hvd.rank()))
    callback = driver.hvd.callbacks.BroadcastGlobalVariablesCallback(root)
    train(model, driver.hvd.DistributedOptimizer(optimizer), [callback, recorder])
    assert_close(recorder.first_weights, oracle.initial_weights(100 + root), 1e-7)
    np.testing.assert_allclose(float(optimizer.learning_rate), 0.01 * (1 + root), rtol=1e-6)
    assert_equal_everywhere([*model.weights, *optimizer.variables])


def test_broadcast_of_a_model_built_by_its_first_batch(driver: ContractDriver) -> None:
    keras.utils.set_random_seed(driver.hvd.rank())
    model = keras.Sequential([keras.layers.Dense(5, activation="tanh"), keras.layers.Dense(1)])
    callback = driver.hvd.callbacks.BroadcastGlobalVariablesCallback(0)
    train(model, driver.hvd.DistributedOptimizer(Adam(0.01)), [callback])
    assert callback.broadcast_done
    assert_equal_everywhere([*model.weights, *model.optimizer.variables])


def test_broadcast_leaves_local_variables_alone(driver: ContractDriver) -> None:
    model, recorder = network(), Recorder()
    callback = driver.hvd.callbacks.BroadcastGlobalVariablesCallback(0, local_variables=model.layers[0].kernel)
    train(model, driver.hvd.DistributedOptimizer(SGD(0.1)), [callback, recorder])
    own = oracle.initial_weights(100 + driver.hvd.rank())
    first = oracle.initial_weights(100)
    assert_close(recorder.first_weights, [own[0], *first[1:]], 1e-7)


def test_broadcast_of_different_models_is_refused(driver: ContractDriver) -> None:
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(1 + min(driver.hvd.rank(), 1)), keras.layers.Dense(1)]
    )
    callback = driver.hvd.callbacks.BroadcastGlobalVariablesCallback(0)
    if driver.hvd.size() == 1:
        train(model, SGD(0.1), [callback])
        return
    with pytest.raises(DesyncError, match="rank 0"):
        train(model, SGD(0.1), [callback])


def test_metrics_are_averaged_for_those_who_come_later(driver: ContractDriver) -> None:
    hvd = driver.hvd
    before, after = Recorder(), Recorder()
    x, y = own_batches(1)[0]
    history = train(
        network(START),
        hvd.DistributedOptimizer(SGD(0.1)),
        [before, hvd.callbacks.MetricAverageCallback(), after],
        epochs=2,
        validation_data=(x, y),
    )
    assert set(after.logs[0]) == {"loss", "val_loss"}
    for epoch in range(2):
        for name in ("loss", "val_loss"):
            every = hvd.world().transport.allgather(np.float64(before.logs[epoch][name]).tobytes())
            mean = np.mean([np.frombuffer(v) for v in every])
            assert after.logs[epoch][name] == pytest.approx(mean, rel=1e-12)
            assert history.history[name][epoch] == after.logs[epoch][name]
            assert hvd.size() == 1 or before.logs[epoch][name] != after.logs[epoch][name]


def test_a_metric_that_is_no_number_is_so_everywhere(driver: ContractDriver) -> None:
    logs = {"loss": 1.0, "other": float("nan") if driver.hvd.rank() == 0 else 2.0}
    driver.hvd.callbacks.MetricAverageCallback().on_epoch_end(0, logs)
    assert logs["loss"] == 1.0
    assert np.isnan(logs["other"])


def test_different_metrics_are_refused(driver: ContractDriver) -> None:
    logs = {"loss": 1.0} if driver.hvd.rank() == 0 else {"loss": 1.0, "more": 2.0}
    callback = driver.hvd.callbacks.MetricAverageCallback()
    if driver.hvd.size() == 1:
        callback.on_epoch_end(0, logs)
        return
    with pytest.raises(DesyncError, match="metrics"):
        callback.on_epoch_end(0, logs)


@pytest.mark.parametrize("nothing", [None, {}], ids=str)
def test_an_epoch_without_metrics(driver: ContractDriver, nothing: Any) -> None:
    callback = driver.hvd.callbacks.MetricAverageCallback()
    callback.on_epoch_end(0, nothing)  # nobody has any
    if driver.hvd.size() == 1:
        return
    logs = {"loss": 1.0} if driver.hvd.rank() == 0 else nothing
    with pytest.raises(DesyncError, match="metrics = loss"):
        callback.on_epoch_end(0, logs)


def test_a_broadcast_done_on_one_rank_only_is_told(driver: ContractDriver) -> None:
    """A callback used in an earlier ``fit`` does nothing more; a new one on another rank must not wait for it."""
    callback = driver.hvd.callbacks.BroadcastGlobalVariablesCallback(0)
    train(network(START), SGD(0.1), [callback])
    train(network(START), SGD(0.1), [callback])
    if driver.hvd.size() == 1:
        return
    if driver.hvd.rank() == 0:
        callback = driver.hvd.callbacks.BroadcastGlobalVariablesCallback(0)
    with pytest.raises(DesyncError, match="they were shared before"):
        train(network(START), SGD(0.1), [callback])


def test_warm_up_rises_to_the_full_rate(driver: ContractDriver) -> None:
    size, recorder = driver.hvd.size(), Recorder()
    callback = driver.hvd.callbacks.LearningRateWarmupCallback(0.8, warmup_epochs=2)
    train(network(START), driver.hvd.DistributedOptimizer(SGD(0.8)), [callback, recorder], epochs=3, steps=4)
    position = [(epoch + (batch + 1) / 4) for epoch in range(2) for batch in range(4)]
    rising = [0.8 / size * (p * (size - 1) / 2 + 1) for p in position]
    np.testing.assert_allclose(recorder.rates, [*rising, *[0.8] * 4], rtol=1e-5)
    assert [round(log["lr"], 6) for log in recorder.logs][-1] == 0.8


@pytest.mark.parametrize(
    ("multiplier", "staircase", "expected"),
    [
        (0.5, True, [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]),
        (lambda epoch: 1 + epoch, True, [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]),
        (lambda epoch: 1 + epoch, False, [1.0, 1.5, 2.0, 2.5, 3.0, 3.5]),
    ],
    ids=["number", "function", "every batch"],
)
def test_schedule(driver: ContractDriver, multiplier: Any, staircase: bool, expected: list[float]) -> None:
    recorder = Recorder()
    callback = driver.hvd.callbacks.LearningRateScheduleCallback(0.01, multiplier, staircase=staircase)
    train(network(START), driver.hvd.DistributedOptimizer(SGD(0.01)), [callback, recorder], epochs=3, steps=2)
    np.testing.assert_allclose(recorder.rates, 0.01 * np.array(expected), rtol=1e-5)


def test_schedule_between_its_epochs_only(driver: ContractDriver) -> None:
    recorder = Recorder()
    callback = driver.hvd.callbacks.LearningRateScheduleCallback(0.01, lambda e: 10.0, start_epoch=1, end_epoch=2)
    train(network(START), driver.hvd.DistributedOptimizer(SGD(0.05)), [callback, recorder], epochs=3, steps=1)
    np.testing.assert_allclose(recorder.rates, [0.05, 0.1, 0.1], rtol=1e-5)


@pytest.mark.parametrize("corrected", [True, False])
def test_momentum_correction_scales_past_gradients(driver: ContractDriver, corrected: bool) -> None:
    """v <- mu * (new rate / old rate) * v - rate * g, as in the paper, in compiled steps too."""
    model = network(START)
    optimizer = driver.hvd.DistributedOptimizer(SGD(0.1, momentum=0.9))
    callback = driver.hvd.callbacks.LearningRateScheduleCallback(0.1, lambda e: 0.5**e, momentum_correction=corrected)
    train(model, optimizer, [callback], epochs=3, steps=1)
    every = [oracle.batches(1, rank)[0] for rank in range(driver.hvd.size())]
    weights, velocity, rate = START, [np.zeros_like(w) for w in START], 0.1
    for epoch in range(3):
        new = 0.1 * 0.5**epoch
        mu = 0.9 * (new / rate if corrected else 1.0)
        rate = new
        velocity = [mu * v - rate * g for v, g in zip(velocity, oracle.mean_gradients(weights, every), strict=True)]
        weights = [w + v for w, v in zip(weights, velocity, strict=True)]
    assert_close(weights_of(model), weights)


def test_schedules_do_not_meet_those_of_the_optimizer(driver: ContractDriver) -> None:
    optimizer = SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5))
    callback = driver.hvd.callbacks.LearningRateScheduleCallback(0.1, 0.5)
    with pytest.raises(PlanError, match="ExponentialDecay"):
        train(network(START), optimizer, [callback])


class _Planted(keras.callbacks.Callback):
    """Plants a metric that only the average tells apart: the best epoch is the second."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.values = [3.0, 1.0, 2.0] if rank == 0 else [3.0, 4.0, 3.5]

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        logs["planted"] = self.values[epoch]


@pytest.mark.parametrize("weights_only", [False, True])
def test_best_model_is_chosen_together_and_saved_once(
    driver: ContractDriver, shared_folder: Path, weights_only: bool
) -> None:
    hvd = driver.hvd
    checkpoint = hvd.callbacks.BestModelCheckpoint(monitor="planted", mode="min", save_weights_only=weights_only)
    suffix = ".weights.h5" if weights_only else ".keras"
    own = shared_folder / f"rank{hvd.rank()}{suffix}"  # a file of each rank's own: only the first may appear
    checkpoint.filepath = str(own)
    kept: list[Any] = []
    model = network(START)
    keep = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: kept.append(weights_of(model)))
    train(model, hvd.DistributedOptimizer(SGD(0.1)), [_Planted(hvd.rank()), checkpoint, keep], epochs=3)
    assert [p.name for p in sorted(shared_folder.iterdir())] == [f"rank0{suffix}"]
    averages = np.mean([_Planted(rank).values for rank in range(hvd.size())], axis=0)
    assert checkpoint.best == pytest.approx(averages.min())
    saved = shared_folder / f"rank0{suffix}"
    loaded = network(START)
    if weights_only:
        loaded.compile(SGD(0.1), "mse")
        loaded.load_weights(saved)
    else:
        loaded = keras.models.load_model(saved)
    assert_close(weights_of(loaded), kept[int(averages.argmin())], 0.0)
    hvd.world().transport.allgather(b"")  # nobody removes the folder before all have read


def test_ranks_without_any_of_this_drift_apart(driver: ContractDriver) -> None:
    """What all the rest is for: the comparisons above can fail."""
    model = network(START)
    fit(model, SGD(0.1), own_batches(2))
    assert_differs_somewhere(model.weights)
