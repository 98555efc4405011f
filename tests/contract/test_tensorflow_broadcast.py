"""Broadcasting variables: bit for bit, all dtypes, any nesting, and never between different models."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdscale.tensorflow as hvd
from tests.contract import oracle
from tests.contract.drivers.tensorflow import Driver

DTYPES = [
    *("float16", "bfloat16", "float32", "float64", "bool", "complex64"),
    *("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
]


def values(seed: int, shape: tuple[int, ...], dtype: str) -> tf.Tensor:
    numbers = np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 100, shape)
    return tf.cast(tf.constant(numbers), dtype)


@pytest.mark.parametrize("inplace", [False, True], ids=["copied", "in place"])
@pytest.mark.parametrize("mode", ["eager", "function"])
def test_every_dtype_and_shape_arrives(driver: Driver, mode: str, inplace: bool) -> None:
    shapes: list[tuple[int, ...]] = [(), (3,), (2, 0), (2, 3)]
    table = [(s, d) for d in DTYPES if not (inplace and d == "complex64") for s in shapes]
    variables = [tf.Variable(values(hvd.rank() * 1000 + i, s, d)) for i, (s, d) in enumerate(table)]

    def share() -> None:
        hvd.broadcast_variables([variables[:5], (variables[5], {"rest": variables[6:]})], root_rank=0, inplace=inplace)

    (tf.function(share) if mode == "function" else share)()
    for i, (variable, (shape, dtype)) in enumerate(zip(variables, table, strict=True)):
        assert np.array_equal(variable.numpy(), values(i, shape, dtype).numpy()), (shape, dtype)


@pytest.mark.parametrize("mode", ["eager", "function"])
def test_a_keras_model_and_its_optimizer(driver: Driver, mode: str) -> None:
    model = driver.model(oracle.initial_weights(seed=hvd.rank()))
    optimizer = keras.optimizers.Adam(0.1)
    optimizer.build(model.trainable_variables)
    optimizer.iterations.assign(hvd.rank() + 5)

    def share() -> None:
        hvd.broadcast_variables([model.variables, optimizer.variables], root_rank=hvd.size() - 1)

    (tf.function(share) if mode == "function" else share)()
    for ours, theirs in zip(driver.weights(model), oracle.initial_weights(seed=hvd.size() - 1), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert int(optimizer.iterations) == hvd.size() - 1 + 5


def test_many_variables_take_several_messages(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvdscale.tensorflow.packing.MESSAGE_BYTES", 64)
    variables = [tf.Variable(tf.fill([n], float(hvd.rank() * 100 + n))) for n in (1, 15, 2, 40, 3, 0, 16)]
    variables.append(tf.Variable(tf.fill([30], tf.cast(hvd.rank(), tf.uint32))))
    hvd.broadcast_variables(variables, root_rank=0)
    for variable in variables[:-1]:
        np.testing.assert_array_equal(variable, np.full(variable.shape, len(variable.numpy())))
    assert not variables[-1].numpy().any()


def test_in_place_into_keras_variables(driver: Driver) -> None:
    variables = [
        keras.Variable(np.full([3], hvd.rank() + 1.0)),
        keras.Variable(np.full([2], hvd.rank()), dtype="bfloat16"),
    ]
    hvd.broadcast_(variables[:1], 0)
    hvd.broadcast_(variables, 0)
    np.testing.assert_array_equal(variables[0], [1.0, 1.0, 1.0])
    np.testing.assert_array_equal(tf.cast(variables[1].value, tf.float32), [0.0, 0.0])


DIFFERENT = {
    "shape": lambda: [tf.Variable(tf.zeros([2 + hvd.rank()]))],
    "dtype": lambda: [tf.Variable(tf.zeros([2], tf.float64 if hvd.rank() else tf.float32))],
    "number": lambda: [tf.Variable(0.0)] * (1 + hvd.rank()),
    "layers": lambda: keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, use_bias=not hvd.rank())]).variables,
}


@pytest.mark.parametrize("mode", ["eager", "function"])
@pytest.mark.parametrize("what", DIFFERENT)
def test_different_models_are_an_error_on_every_rank(driver: Driver, what: str, mode: str) -> None:
    variables = DIFFERENT[what]()

    def share() -> None:
        hvd.broadcast_variables(variables, root_rank=0)

    run = tf.function(share) if mode == "function" else share
    if hvd.size() == 1:
        run()
        return
    with pytest.raises(hvd.DesyncError) as caught:
        run()
    assert len(set(hvd.allgather_object(str(caught.value)))) == 1


def test_inside_a_process_set(driver: Driver) -> None:
    variable = tf.Variable([hvd.rank() + 1.0])
    members = range(0, hvd.size(), 2)
    if hvd.rank() in members:
        hvd.broadcast_variables([variable], members[-1], process_set=driver.even_ranks)
    assert variable.numpy() == [(members[-1] if hvd.rank() in members else hvd.rank()) + 1.0]


@pytest.mark.parametrize("root", [-1, 1000])
def test_the_root_must_be_a_rank(driver: Driver, root: int) -> None:
    with pytest.raises(hvd.PlanError, match="root_rank"):
        hvd.broadcast_variables([tf.Variable(0.0)], root)


def test_global_variables_in_a_graph(driver: Driver) -> None:
    with tf.Graph().as_default():
        variable = tf.compat.v1.get_variable("w", initializer=tf.constant([hvd.rank() + 1.0, 2.0]))
        hook = hvd.BroadcastGlobalVariablesHook(0)
        with tf.compat.v1.train.MonitoredTrainingSession(hooks=[hook]) as session:
            np.testing.assert_array_equal(session.run(variable), [1.0, 2.0])
    with pytest.raises(RuntimeError, match="eager"):
        hvd.broadcast_global_variables(0)
