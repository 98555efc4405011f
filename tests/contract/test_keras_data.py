"""shard_dataset under fit: every sample once over all ranks, and a state that counts what was trained on."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import hvdscale.keras as hvd
from tests.contract.data import all_numbers, everyones
from tests.contract.driver import ContractDriver

N = 101
WORKERS = ((0, False), (2, False))


class Trained(keras.Model):
    """Notes the sample numbers in the batches it is trained on."""

    def __init__(self, weights: int = 0) -> None:
        super().__init__()
        self.numbers: list[int] = []
        self.padding = 0
        self.layer = keras.layers.Dense(1)

    def call(self, x: Any) -> Any:
        return self.layer(x)

    def train_step(self, *args: Any) -> dict[str, Any]:
        x, _, weight = keras.utils.unpack_x_y_sample_weight(args[-1])
        samples = keras.ops.convert_to_numpy(x)[:, 0].astype(int)
        valid = np.ones(len(samples), bool) if weight is None else keras.ops.convert_to_numpy(weight) > 0
        self.numbers += samples[valid].tolist()
        self.padding += int((~valid).sum())
        return {"loss": 0.0}


def trained(
    batches: hvd.ShardPlan, epochs: int = 1, stop: int | None = None, count: bool = True, **fit: Any
) -> Trained:
    model = Trained()
    model.compile("sgd", "mse", run_eagerly=True)
    callbacks: list[Any] = [batches.counter] if count else []
    if stop is not None:
        callbacks.append(StopAfter(stop))
    model.fit(batches, epochs=epochs, callbacks=callbacks, verbose=0, **fit)
    return model


class StopAfter(keras.callbacks.Callback):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self._steps = steps

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.model.stop_training = batch + 1 >= self._steps


def rows() -> tuple[np.ndarray, np.ndarray]:
    numbers = np.arange(N, dtype=np.float32).reshape(-1, 1)
    return numbers, numbers * 2


@pytest.mark.parametrize(("workers", "processes"), WORKERS)
@pytest.mark.parametrize("policy", ["ordered", "random", "hash"])
def test_every_epoch_holds_every_sample_once_in_the_plans_order(
    driver: ContractDriver, rank: int, size: int, policy: str, workers: int, processes: bool
) -> None:
    plan = hvd.ShardPlan(N, size, policy, seed=1)
    batches = hvd.shard_dataset(rows(), plan, 8, workers=workers, use_multiprocessing=processes)
    model = trained(batches, epochs=2)
    assert model.numbers == [*plan.indices(rank, 0), *plan.indices(rank, 1)]
    assert batches.epoch == 2
    hvd.verify_epoch(batches)
    assert all_numbers(driver, model.numbers) == sorted([*range(N), *range(N)])


@pytest.mark.parametrize(("workers", "processes"), WORKERS)
def test_exactly_once_over_a_stop_of_ranks_that_got_differently_far(
    driver: ContractDriver, rank: int, size: int, workers: int, processes: bool
) -> None:
    plan = hvd.ShardPlan(N, size, seed=1)
    batches = hvd.shard_dataset(rows(), plan, 4, workers=workers, use_multiprocessing=processes)
    read = trained(batches, stop=2 + 3 * rank).numbers
    reader = plan.reader(rank, 4)
    for _ in range(2 + 3 * rank):
        next(reader)
    assert batches.state_dict() == reader.state_dict()
    rest = hvd.ShardPlan.resume(everyones(driver, batches.state_dict()), size)
    going_on = hvd.shard_dataset(rows(), rest, 4, workers=workers)
    read += trained(going_on).numbers
    hvd.verify_epoch(going_on)
    assert all_numbers(driver, read) == list(range(N))


def test_fit_goes_on_where_it_stopped(rank: int, size: int) -> None:
    plan = hvd.ShardPlan(N, size, seed=1)
    batches = hvd.shard_dataset(rows(), plan, 4)
    first = trained(batches, stop=3).numbers
    assert first + trained(batches).numbers == plan.indices(rank).tolist()


def test_without_the_counter_each_pass_reads_one_epoch_and_a_warning_says_so(rank: int, size: int) -> None:
    plan = hvd.ShardPlan(N, size, seed=1)
    batches = hvd.shard_dataset(rows(), plan, 8)
    with pytest.warns(UserWarning, match="Epoch 0 of the plan is read again and again"):
        assert trained(batches, epochs=3, count=False).numbers == plan.indices(rank).tolist() * 3
    assert batches.state_dict()["step"] == 0


@pytest.mark.filterwarnings("error:Epoch")
def test_validation_needs_no_counter_and_evaluation_reads_on_no_epoch(rank: int, size: int) -> None:
    plan = hvd.ShardPlan(N, size, seed=1)
    batches, others = hvd.shard_dataset(rows(), plan, 8), hvd.shard_dataset(rows(), plan, 8)
    model = trained(batches, epochs=4, validation_data=others)
    assert model.numbers == [number for epoch in range(4) for number in plan.indices(rank, epoch)]
    assert (batches.epoch, others.epoch) == (4, 0)
    model.evaluate(batches, verbose=0)
    assert len(model.predict(batches, verbose=0)) == plan.size(rank, 4)
    assert batches.state_dict()["step"] == 0


def test_several_steps_a_call_are_counted_one_by_one(size: int) -> None:
    batches = hvd.shard_dataset(rows(), hvd.ShardPlan(N, size, seed=1), 4)
    model = keras.Sequential([keras.layers.Dense(1)])
    several = {"tensorflow": 5, "torch": 1}[keras.backend.backend()]  # Keras refuses more on PyTorch
    model.compile("sgd", "mse", steps_per_execution=several)
    model.fit(batches, epochs=2, verbose=0, callbacks=[batches.counter])
    assert (batches.epoch, batches.state_dict()["step"]) == (2, 0)
    hvd.verify_epoch(batches, 0)
    hvd.verify_epoch(batches, 1)


def test_a_fit_that_broke_off_is_gone_on_with(rank: int, size: int) -> None:
    class Fails(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch == 2:
                raise KeyboardInterrupt

    plan, model = hvd.ShardPlan(N, size, seed=1), Trained()
    batches = hvd.shard_dataset(rows(), plan, 4, workers=2)
    model.compile("sgd", "mse", run_eagerly=True)
    with pytest.raises(KeyboardInterrupt):
        model.fit(batches, verbose=0, callbacks=[batches.counter, Fails()])
    assert batches.state_dict()["step"] == 3
    model.fit(batches, verbose=0, callbacks=[batches.counter])
    assert model.numbers == plan.indices(rank).tolist()


def test_the_counter_of_another_data_set_is_refused(size: int) -> None:
    one, other = (hvd.shard_dataset(rows(), hvd.ShardPlan(N, size), 4) for _ in range(2))
    model = Trained()
    model.compile("sgd", "mse", run_eagerly=True)
    with pytest.raises(hvd.PlanError, match="The counter in callbacks is of another data set"):
        model.fit(one, verbose=0, callbacks=[other.counter])


def test_processes_fetch_too(rank: int, size: int) -> None:
    plan = hvd.ShardPlan(N, size, seed=1)
    batches = hvd.shard_dataset(rows(), plan, 16, workers=1, use_multiprocessing=True)
    assert trained(batches).numbers == plan.indices(rank).tolist()


def test_padding_weighs_nothing(driver: ContractDriver, size: int) -> None:
    plan = hvd.ShardPlan(N, size, seed=1, tail="pad")
    model = trained(hvd.shard_dataset(rows(), plan, 16))
    assert all_numbers(driver, model.numbers) == list(range(N))
    assert sum(everyones(driver, model.padding)) == -(-N // (16 * size)) * 16 * size - N


def test_steps_per_epoch_is_refused(size: int) -> None:
    batches = hvd.shard_dataset(rows(), hvd.ShardPlan(N, size), 4)
    with pytest.raises(hvd.PlanError, match="steps_per_epoch makes it 2"):
        trained(batches, steps_per_epoch=2)


def test_a_stream_has_no_length(size: int) -> None:
    with pytest.raises(hvd.PlanError, match="ShardStream has none"):
        hvd.shard_dataset(lambda start: [], hvd.ShardStream(size), 4)


WEIGHTS = {
    "none": None,
    "one a sample": np.full(37, 2.0, np.float32),
    "several a sample": np.full((37, 3), 2.0, np.float32),
    "by output": {"one": np.full(37, 2.0, np.float32), "other": np.full(37, 2, int)},
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("inputs", ["array", "dictionary"])
def test_what_only_fills_has_no_weight_whatever_the_data_says(inputs: str, weights: str) -> None:
    x, y = (part[:37] for part in rows())
    data = ({"array": x, "dictionary": {"a": x, "b": x}}[inputs], {"one": y, "other": y})
    own = () if WEIGHTS[weights] is None else (WEIGHTS[weights],)
    batches = hvd.shard_dataset((*data, *own), hvd.ShardPlan(37, 1, "ordered", tail="pad"), 8, shard=0)
    last = [batches[i] for i in range(len(batches))][-1]
    assert len(last) == 3
    for of in keras.tree.flatten(last[2]):
        assert of.reshape(8, -1)[:, 0].tolist() == [2.0 if own else 1.0] * 5 + [0.0] * 3


@pytest.mark.parametrize("data", [rows()[0], {"a": rows()[0]}, (rows()[0],), (rows()[0],) * 4])
def test_what_fills_and_cannot_have_a_weight_is_refused(data: Any) -> None:
    batches = hvd.shard_dataset(data, hvd.ShardPlan(N, 1, tail="pad"), 8, shard=0)
    with pytest.raises(hvd.PlanError, match=r"this data gives \d parts, .* Give \(x, y\) or"):
        trained(batches)
