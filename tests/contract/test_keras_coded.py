"""Coded gradients among the things a Keras script does: fit, embeddings, loss scaling, accumulation, local layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

from hvdscale.sync import EveryStep
from tests.contract import oracle
from tests.contract.driver import ContractDriver
from tests.contract.keras_reference import (
    BACKEND,
    all_batches,
    assert_close,
    assert_equal_everywhere,
    fit,
    network,
    own_batches,
    plain_weights,
    small_batches,
    weights_of,
)

START = oracle.initial_weights()
SGD, Adam = keras.optimizers.SGD, keras.optimizers.Adam
HALF = EveryStep(wire="fp16")  # close enough to be compared with training in float32


def distribute(driver: ContractDriver, optimizer: Any, model: Any, plan: EveryStep = HALF, **more: Any) -> Any:
    return driver.hvd.DistributedOptimizer(optimizer, model=model, sync=plan, **more)


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "schedule": lambda: SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5), global_clipnorm=0.5),
    "accumulation": lambda: SGD(0.1, gradient_accumulation_steps=2, clipnorm=0.3),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(SGD(0.1), initial_scale=8.0),
    "averages": lambda: SGD(0.1, momentum=0.9, use_ema=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_fit_ends_near_one_process_with_everyones_gradients(driver: ContractDriver, kind: str) -> None:
    model = network(START)
    fit(model, distribute(driver, OPTIMIZERS[kind](), model), own_batches(4))
    assert_close(weights_of(model), plain_weights(OPTIMIZERS[kind](), all_batches(4), START), 2e-3)
    assert_equal_everywhere(model.weights)


def test_several_steps_per_execution_send_a_message_each(driver: ContractDriver, size: int) -> None:
    ends = []
    for steps in (1, 3) if BACKEND == "tensorflow" else (1, 1):  # on torch, Keras takes 1 only
        model = network(START)
        optimizer = distribute(driver, SGD(0.1), model, EveryStep(wire="int8"))
        fit(model, optimizer, own_batches(6), steps_per_execution=steps)
        if size > 1:
            assert optimizer.sync.metrics()["rounds"] == 6
        ends.append(weights_of(model))
    for one, other in zip(*ends, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_model_with_an_embedding_trains_as_it_is(driver: ContractDriver, rank: int, size: int) -> None:
    """Its gradients are sparse in TensorFlow: they go dense, as float32."""
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [keras.Input((3,), dtype="int32"), keras.layers.Embedding(11, 4), keras.layers.Flatten(), keras.layers.Dense(1)]
    )
    start = np.array(model.layers[0].get_weights()[0])
    words = np.array([[1, 2, 3], [4, 5, 6]]) + rank
    fit(model, distribute(driver, SGD(0.5), model, EveryStep(wire="int4")), [(words, np.ones((2, 1), np.float32))] * 3)
    assert_equal_everywhere(model.weights)
    moved = np.abs(model.layers[0].get_weights()[0] - start).sum(1) > 0
    assert set(np.flatnonzero(moved)) == set(range(1, 7 + size - 1))


def test_one_gradient_whose_shape_only_the_running_graph_knows(driver: ContractDriver, rank: int, size: int) -> None:
    """As TensorFlow's graphs have them behind a matrix product of slices."""
    keras.utils.set_random_seed(3)
    table = keras.Variable(np.ones((4, 3), np.float32), name="table")
    optimizer = distribute(driver, SGD(1.0), None)

    def step(gradient: Any) -> None:
        optimizer.apply([gradient], [table])

    if BACKEND == "tensorflow":
        import tensorflow as tf

        step = tf.function(step, input_signature=[tf.TensorSpec(None, tf.float32)])
    step(keras.ops.full((4, 3), float(rank)))
    np.testing.assert_allclose(np.asarray(table.numpy()), 1 - (size - 1) / 2, atol=1e-3)


@pytest.mark.parametrize("eager", [False, True])
def test_one_rank_overflows_and_all_skip_the_step(
    driver: ContractDriver, policy: Callable[[str], None], eager: bool
) -> None:
    policy("mixed_float16")
    small = [np.float32(0.1) * w for w in START]
    model = network(small)
    batches = small_batches(own_batches(4))
    if driver.hvd.rank() == 0:
        batches[1][0][0, 0] = np.inf
    fit(model, distribute(driver, SGD(0.1), model, EveryStep(wire="int8")), batches, run_eagerly=eager)
    scaler = model.optimizer
    assert isinstance(scaler, keras.optimizers.LossScaleOptimizer)
    assert_equal_everywhere([*model.weights, scaler.dynamic_scale, scaler.inner_optimizer.iterations])
    assert np.isfinite(np.concatenate([w.ravel() for w in weights_of(model)])).all()
    assert int(scaler.inner_optimizer.iterations) == 3


def test_local_layers_keep_their_own_gradients(driver: ContractDriver, rank: int, size: int) -> None:
    model = network(START)
    own = model.layers[-1]
    fit(
        model,
        driver.hvd.PartialDistributedOptimizer(SGD(0.1), local_layers=own, model=model, sync=EveryStep(wire="int8")),
        own_batches(3),
    )
    shared = [v for v in model.weights if all(v is not mine for mine in own.weights)]
    assert_equal_everywhere(shared)
    if size > 1:
        everyone = driver.everyones(np.concatenate([np.asarray(w).ravel() for w in own.get_weights()]))
        assert (everyone != everyone[0]).any()
