"""Elastic states: saved, restored, given to every rank; and training that starts again after a failure."""

from __future__ import annotations

from collections.abc import Iterator

import keras
import numpy as np
import pytest
import tensorflow as tf
from horovod.common.exceptions import HorovodInternalError

import hvdscale.tensorflow as hvd
from tests.contract import oracle
from tests.contract.drivers.tensorflow import Driver


def test_a_keras_state_saves_restores_and_syncs(driver: Driver) -> None:
    model = driver.model(oracle.initial_weights(seed=hvd.rank()))
    model.compile(loss="mse", optimizer=keras.optimizers.Adam(0.01))
    state = hvd.elastic.TensorFlowKerasState(model, epoch=hvd.rank(), batch=0)
    state.sync()
    assert state.epoch == 0
    for ours, theirs in zip(driver.weights(model), oracle.initial_weights(seed=0), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    x = np.ones([4, oracle.INPUTS], np.float32)
    model.fit(x, np.ones([4, 1]), epochs=2, verbose=0)
    state.epoch = 7
    state.restore()
    assert (state.epoch, int(model.optimizer.iterations)) == (0, 0)
    for ours, theirs in zip(driver.weights(model), oracle.initial_weights(seed=0), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_state_of_variables_saves_restores_and_syncs(driver: Driver) -> None:
    variables = [tf.Variable([hvd.rank() + 1.0]), tf.Variable(tf.cast([hvd.rank()], tf.bfloat16))]
    state = hvd.elastic.TensorFlowState(variables, step=0)
    variables[0].assign([hvd.rank() + 10.0])
    state.step = 3
    state.save()
    variables[0].assign([0.0])
    state.step = 4
    state.restore()
    assert (state.step, variables[0].numpy()[0]) == (3, hvd.rank() + 10.0)
    state.sync()
    assert variables[0].numpy()[0] == 10.0


def test_values_arrive_and_come_back_as_they_were(driver: Driver) -> None:
    state = hvd.elastic.TensorFlowState([tf.Variable(0.0)], shape=(hvd.rank(), 2), names={hvd.rank(): [b"x"]})
    state.sync()
    assert (state.shape, state.names) == ((0, 2), {0: [b"x"]})
    state.names[0].append(b"y")  # after the last commit
    state.restore()
    assert state.names == {0: [b"x"]}


@pytest.mark.parametrize("when", ["given", "committed"])
def test_values_that_cannot_travel_are_refused_at_once(driver: Driver, when: str) -> None:
    odd = keras.optimizers.SGD(0.1)
    if when == "given":
        with pytest.raises(hvd.StateError, match=r"state\.odd is a keras"):
            hvd.elastic.TensorFlowState([tf.Variable(0.0)], odd=odd)
        return
    state = hvd.elastic.TensorFlowState([tf.Variable(0.0)], odd=None)
    state.odd = [odd]
    with pytest.raises(hvd.StateError, match=r"state\.odd\[0\] is a keras"):
        state.commit()


def test_the_state_of_a_keras_model_is_the_keras_adapters() -> None:
    from hvdscale.tensorflow.keras.elastic import KerasState

    assert issubclass(hvd.elastic.TensorFlowKerasState, KerasState)


@pytest.fixture
def joined_again(driver: Driver) -> Iterator[None]:
    """Leave the job as the other tests want it: with their process set."""
    yield
    hvd.shutdown()
    driver.init()


@pytest.mark.usefixtures("joined_again")
def test_training_starts_again_from_the_last_commit(driver: Driver) -> None:
    weight = tf.Variable(0.0)
    state = hvd.elastic.TensorFlowState([weight], step=0, failures=0)
    world = hvd.world()
    failed: list[int] = []

    @hvd.elastic.run
    def train(state: hvd.elastic.TensorFlowState) -> float:
        while state.step < 4:
            weight.assign_add(hvd.allreduce(1.0))
            state.step += 1
            if state.step == 3 and not failed:
                failed.append(state.step)
                raise HorovodInternalError("a peer left")
            state.commit()
        return float(weight)

    assert train(state) == 4.0
    assert failed == [3]
    assert hvd.world() is not world  # it went through our shutdown and init
    assert hvd.size() == world.size


def test_other_errors_are_not_swallowed(driver: Driver) -> None:
    @hvd.elastic.run
    def train(state: hvd.elastic.TensorFlowState) -> None:
        raise tf.errors.UnknownError(None, None, "disk full")

    with pytest.raises(tf.errors.UnknownError, match="disk full"):
        train(hvd.elastic.TensorFlowState([tf.Variable(0.0)]))


def test_what_cannot_be_is_refused(driver: Driver) -> None:
    with pytest.raises(hvd.PlanError, match="no variables yet"):
        hvd.elastic.TensorFlowKerasState(keras.Sequential([keras.layers.Dense(1)]))
    with pytest.raises(hvd.PlanError, match="no optimizer"):
        hvd.elastic.TensorFlowKerasState(driver.model(oracle.initial_weights()))
    with pytest.raises(hvd.PlanError, match="variables"):
        hvd.elastic.TensorFlowState()
