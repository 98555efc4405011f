"""Collectives on values, elastic state, and batch statistics over all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from horovod.common.exceptions import HorovodInternalError

from hvdscale.errors import PlanError, StateError
from tests.contract import oracle
from tests.contract.driver import ContractDriver
from tests.contract.keras_reference import (
    all_batches,
    assert_close,
    assert_equal_everywhere,
    fit,
    gradients,
    network,
    own_batches,
    plain_weights,
    weights_of,
)

START = oracle.initial_weights()
SGD, Adam = keras.optimizers.SGD, keras.optimizers.Adam

VALUES: dict[str, Callable[[float], Any]] = {
    "number": lambda v: v,
    "array": lambda v: np.full((2, 3), v, np.float32),
    "tensor": lambda v: keras.ops.full((2, 3), v, "float32"),
    "variable": lambda v: keras.Variable(np.full((2, 3), v, np.float32)),
    "bfloat16": lambda v: keras.ops.full((2, 3), v, "bfloat16"),
}


def numbers(value: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(value), np.float64)


@pytest.mark.parametrize("kind", VALUES)
def test_allreduce(driver: ContractDriver, kind: str) -> None:
    hvd = driver.hvd
    value = VALUES[kind](float(hvd.rank()))
    ranks = np.arange(hvd.size())
    for arguments, expected in [
        ({}, ranks.mean()),
        ({"average": True}, ranks.mean()),
        ({"average": False}, ranks.sum()),
        ({"op": hvd.Sum}, ranks.sum()),
        ({"op": hvd.Max}, ranks.max()),
        ({"op": hvd.Sum, "prescale_factor": 2.0, "postscale_factor": 4.0}, 8.0 * ranks.sum()),
    ]:
        np.testing.assert_allclose(numbers(hvd.allreduce(value, **arguments)), expected)


@pytest.mark.parametrize("kind", VALUES)
def test_broadcast_and_allgather(driver: ContractDriver, kind: str) -> None:
    hvd = driver.hvd
    value = VALUES[kind](float(hvd.rank()))
    np.testing.assert_array_equal(numbers(hvd.broadcast(value, hvd.size() - 1)), hvd.size() - 1)
    gathered = numbers(hvd.allgather(value))
    rows = 1 if kind == "number" else 2
    assert gathered.shape[0] == rows * hvd.size()
    np.testing.assert_array_equal(gathered.reshape(hvd.size(), -1)[:, 0], np.arange(hvd.size()))


def test_allgather_of_unequal_lengths(driver: ContractDriver) -> None:
    hvd = driver.hvd
    gathered = numbers(hvd.allgather(np.full(hvd.rank() + 1, float(hvd.rank()), np.float32)))
    np.testing.assert_array_equal(gathered, np.repeat(np.arange(hvd.size()), np.arange(hvd.size()) + 1))


def test_reducescatter(driver: ContractDriver) -> None:
    hvd = driver.hvd
    value = np.arange(2 * hvd.size(), dtype=np.float32).reshape(hvd.size(), 2)
    np.testing.assert_allclose(numbers(hvd.reducescatter(value)), value[hvd.rank() : hvd.rank() + 1])
    summed = numbers(hvd.reducescatter(value, op=hvd.Sum))
    np.testing.assert_allclose(summed, hvd.size() * value[hvd.rank() : hvd.rank() + 1])


def test_broadcast_variables_of_every_dtype(driver: ContractDriver) -> None:
    rank = driver.hvd.rank()
    variables = [
        keras.Variable(np.full((2, 2), rank + 0.5), dtype=dtype) for dtype in ("float32", "bfloat16", "float16")
    ]
    variables += [keras.Variable(rank, dtype=dtype, trainable=False) for dtype in ("int32", "int64", "uint8")]
    variables.append(keras.Variable(rank == 0, dtype="bool", trainable=False))
    variables.append(keras.Variable(np.zeros((0, 3), np.float32)))
    driver.hvd.broadcast_variables(variables, root_rank=0)
    for variable, expected in zip(variables, [0.5, 0.5, 0.5, 0, 0, 0, True, 0.0], strict=True):
        np.testing.assert_array_equal(np.asarray(numbers(variable)), expected)


def test_broadcast_global_variables_of_a_model(driver: ContractDriver) -> None:
    model = network()
    fit(model, Adam(0.01), own_batches(1))
    driver.hvd.broadcast_global_variables(0, model=model)
    assert_equal_everywhere([*model.weights, *model.optimizer.variables])


def test_keras_state_saves_restores_and_shares(driver: ContractDriver) -> None:
    hvd = driver.hvd
    model = network()
    fit(model, hvd.DistributedOptimizer(Adam(0.01)), own_batches(1))
    state = hvd.elastic.KerasState(model, batch=hvd.rank(), epoch=7, note={"list": [1, 2.5]})
    state.sync()
    assert (state.batch, state.epoch, state.note) == (0, 7, {"list": [1, 2.5]})
    assert_equal_everywhere([*model.weights, *model.optimizer.variables])
    kept, iterations = weights_of(model), int(model.optimizer.iterations)
    fit(model, model.optimizer, own_batches(2))
    state.batch = 99
    state.restore()
    assert state.batch == 0
    assert int(model.optimizer.iterations) == iterations
    assert_close(weights_of(model), kept, 0.0)
    state.batch = 5
    fit(model, model.optimizer, own_batches(2))
    state.commit()
    state.restore()
    assert state.batch == 5
    assert int(model.optimizer.iterations) == iterations + 2


def test_keras_state_needs_variables_and_plain_values(driver: ContractDriver) -> None:
    hvd = driver.hvd
    unbuilt = keras.Sequential([keras.layers.Dense(1)])
    unbuilt.compile(SGD(0.1), "mse")
    with pytest.raises(PlanError, match="no variables yet"):
        hvd.elastic.KerasState(unbuilt)
    with pytest.raises(PlanError, match="no optimizer"):
        hvd.elastic.KerasState(network(START))
    with pytest.raises(StateError, match=r"state\.odd is a builtins\.object"):
        hvd.elastic.KerasState(network(START), SGD(0.1), odd=object())
    state = hvd.elastic.KerasState(network(START), SGD(0.1), odd={})
    state.odd = {"list": [1, SGD(0.1)]}
    with pytest.raises(StateError, match=r"state\.odd\['list'\]\[1\] is a keras"):
        state.commit()


VALUES_OF_A_STATE: dict[str, Any] = {
    "tuple": (1, (2, "three")),
    "numbers as keys": {1: "one", (2, 3): None},
    "set": {1, 2},
    "bytes": b"\x00\xff",
    "not finite": [float("inf"), -float("inf")],
    "large": 2**80,
    "array": np.arange(6, dtype=np.float16).reshape(2, 3),
    "empty array": np.zeros((0, 3), np.int8),
    "scalar": np.float32(0.1),
    "mixture": {"a": [np.int64(3), (b"x", np.ones(2)), {"b": {4.5: True}}]},
}


@pytest.mark.parametrize("kind", VALUES_OF_A_STATE)
def test_values_of_a_state_arrive_as_they_were(driver: ContractDriver, kind: str) -> None:
    given = VALUES_OF_A_STATE[kind]
    value = given if driver.hvd.rank() == 0 else "another"
    state = driver.hvd.elastic.KerasState(network(START), SGD(0.1), value=value)
    state.sync()
    assert repr(state.value) == repr(given)  # types too
    np.testing.assert_equal(state.value, given)


def test_what_was_committed_does_not_change(driver: ContractDriver) -> None:
    state = driver.hvd.elastic.KerasState(network(START), SGD(0.1), seen=[1])
    state.seen.append(2)
    state.commit()
    for _ in range(2):
        state.seen.append(3)
        state.restore()
        assert state.seen == [1, 2]


def test_elastic_run_goes_back_to_the_last_commit(driver: ContractDriver) -> None:
    hvd = driver.hvd
    model = network()
    model.compile(hvd.DistributedOptimizer(SGD(0.1)), "mse")
    state = hvd.elastic.KerasState(model, epoch=0)
    resets: list[int] = []
    state.register_reset_callbacks([lambda: resets.append(state.epoch)])
    batches = own_batches(4)

    @hvd.elastic.run
    def train(state: Any) -> str:
        while state.epoch < 4:
            fit(model, model.optimizer, [batches[state.epoch]])
            if state.epoch == 2 and not resets:
                raise HorovodInternalError("a rank was lost")  # its step must not count
            state.epoch += 1
            state.commit()
        return "done"

    assert train(state) == "done"
    assert resets == [2]
    start = oracle.initial_weights(100)  # the first rank's
    assert_close(weights_of(model), plain_weights(SGD(0.1), all_batches(4), start))
    hvd.shutdown()
    driver.init()  # process sets end with a reset


def test_elastic_callbacks_keep_count(driver: ContractDriver) -> None:
    hvd = driver.hvd
    model = network(START)
    model.compile(hvd.DistributedOptimizer(SGD(0.1)), "mse")
    state = hvd.elastic.KerasState(model, batch=0, epoch=3)
    seen: list[tuple[int, int]] = []
    commits: list[int] = []
    commit = state.commit
    state.commit = lambda: (commits.append(state.batch), commit())
    watch = keras.callbacks.LambdaCallback(on_train_batch_end=lambda b, logs: seen.append((state.epoch, state.batch)))
    elastic = hvd.elastic
    callbacks = [
        elastic.UpdateBatchStateCallback(state),
        elastic.UpdateEpochStateCallback(state),
        watch,
        elastic.CommitStateCallback(state, batches_per_commit=2),
    ]
    x, y = (np.concatenate(parts) for parts in zip(*own_batches(4), strict=True))
    model.fit(x, y, batch_size=8, epochs=5, initial_epoch=3, verbose=0, callbacks=callbacks)
    assert seen == [(epoch, batch) for epoch in (3, 4) for batch in range(4)]
    assert commits == [1, 3, 0, 1, 3, 0]
    assert (state.batch, state.epoch) == (0, 5)


def _normalised(layer: Any) -> Any:
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(5, activation="tanh"), layer, keras.layers.Dense(1)]
    )
    rng = np.random.default_rng(3)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(size=variable.shape).astype(np.float32))
    return model


@pytest.mark.parametrize("eager", [False, True])
def test_batch_norm_counts_all_ranks_batches_as_one(driver: ContractDriver, eager: bool) -> None:
    ours = _normalised(driver.hvd.SyncBatchNormalization(momentum=0.5))
    fit(ours, driver.hvd.DistributedOptimizer(SGD(0.1)), own_batches(3), run_eagerly=eager)
    theirs = _normalised(keras.layers.BatchNormalization(momentum=0.5))
    fit(theirs, SGD(0.1), all_batches(3))
    assert_close(weights_of(ours), weights_of(theirs), 1e-4)
    alone = _normalised(keras.layers.BatchNormalization(momentum=0.5))
    fit(alone, SGD(0.1), own_batches(3))
    assert driver.hvd.size() == 1 or np.abs(weights_of(alone)[0] - weights_of(ours)[0]).max() > 1e-3


def test_batch_norms_of_parallel_branches_do_not_meet(driver: ContractDriver) -> None:
    def branches(kind: Any) -> Any:
        inputs = keras.Input((3,))
        sides = [kind(momentum=0.5)(keras.ops.power(inputs, power)) for power in (1, 2, 3)]
        model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.concatenate(sides)))
        rng = np.random.default_rng(3)
        for variable in model.trainable_variables:
            variable.assign(rng.normal(size=variable.shape).astype(np.float32))
        return model

    if driver.hvd.rank() == 0:
        driver.hvd.SyncBatchNormalization()  # moves Keras's automatic names
    ours = branches(driver.hvd.SyncBatchNormalization)
    fit(ours, driver.hvd.DistributedOptimizer(SGD(0.01)), own_batches(3))
    theirs = branches(keras.layers.BatchNormalization)
    fit(theirs, SGD(0.01), all_batches(3))
    assert_close(weights_of(ours), weights_of(theirs), 1e-3)


@pytest.mark.parametrize("sizes", [lambda rank: 4 + 3 * rank, lambda rank: 5 * rank], ids=["uneven", "none on rank 0"])
def test_batch_norm_over_unequal_batches(driver: ContractDriver, sizes: Callable[[int], int]) -> None:
    hvd = driver.hvd
    every = [oracle.batches(1, rank, size=sizes(rank) if hvd.size() > 1 else 4)[0] for rank in range(hvd.size())]
    layer = hvd.SyncBatchNormalization(momentum=0.0)
    layer.build((None, 3))
    layer(every[hvd.rank()][0].astype(np.float32), training=True)
    joined = np.concatenate([x for x, _ in every])
    np.testing.assert_allclose(numbers(layer.moving_mean), joined.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(numbers(layer.moving_variance), joined.var(0), rtol=1e-5)


def test_batch_norm_over_a_process_set(driver: ContractDriver) -> None:
    hvd = driver.hvd
    peers = range(0, hvd.size(), 2) if hvd.rank() % 2 == 0 else [hvd.rank()]
    every = {rank: oracle.batches(1, rank, size=4 + rank)[0][0].astype(np.float32) for rank in peers}
    layer = hvd.SyncBatchNormalization(momentum=0.0, process_set=driver.even_ranks)
    layer.build((None, 3))
    layer(every[hvd.rank()], training=True)
    joined = np.concatenate([every[rank] for rank in peers])
    np.testing.assert_allclose(numbers(layer.moving_mean), joined.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(numbers(layer.moving_variance), joined.var(0), rtol=1e-5)


def test_variables_of_a_process_set(driver: ContractDriver) -> None:
    hvd = driver.hvd
    variable = keras.Variable(np.full((2,), hvd.rank() + 1.0, np.float32))
    hvd.broadcast_variables([variable], root_rank=0, process_set=driver.even_ranks)
    np.testing.assert_array_equal(numbers(variable), 1.0 if hvd.rank() % 2 == 0 else hvd.rank() + 1.0)


def test_batch_norm_of_images_and_masks(driver: ContractDriver) -> None:
    hvd = driver.hvd
    rng = [np.random.default_rng([4, rank]) for rank in range(hvd.size())]
    images = [r.normal(size=(2, 3, 4, 5)).astype(np.float32) for r in rng]
    masks = [r.integers(0, 2, (2, 3, 4)).astype(bool) for r in rng]
    layer = hvd.SyncBatchNormalization(momentum=0.0)
    layer.build((None, 3, 4, 5))
    layer(images[hvd.rank()], training=True, mask=keras.ops.convert_to_tensor(masks[hvd.rank()]))
    kept = np.concatenate([i[m] for i, m in zip(images, masks, strict=True)])  # [kept positions, 5]
    np.testing.assert_allclose(numbers(layer.moving_mean), kept.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(numbers(layer.moving_variance), kept.var(0), rtol=1e-4)


def test_batch_norm_can_be_saved(driver: ContractDriver, tmp_path: Any) -> None:
    model = _normalised(driver.hvd.SyncBatchNormalization())
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(loaded.layers[1], driver.hvd.SyncBatchNormalization)


def test_gradients_flow_through_the_shared_statistics(driver: ContractDriver) -> None:
    hvd = driver.hvd
    ours = _normalised(hvd.SyncBatchNormalization())
    theirs = _normalised(keras.layers.BatchNormalization())
    mine = gradients(ours, own_batches(1)[0])
    mean = [numbers(hvd.allreduce(g, name=f"checked.{i}")) for i, g in enumerate(mine)]
    joined = gradients(theirs, all_batches(1)[0])
    assert_close(mean, [numbers(g) for g in joined], 1e-4)
