"""Rounds in loops of one's own in TensorFlow: eager, a step in a graph, and several steps in one graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdscale.tensorflow as hvd
from hvdscale.sync import DiLoCo, LocalSGD
from tests.contract.driver import ContractDriver
from tests.contract.oracle import batches, initial_weights

Step = Callable[[tf.Tensor, tf.Tensor], None]


def eager(step: Step, x: tf.Tensor, y: tf.Tensor) -> None:
    for i in range(len(x)):
        step(x[i], y[i])


def one_a_graph(step: Step, x: tf.Tensor, y: tf.Tensor) -> None:
    compiled = tf.function(step)
    for i in range(len(x)):
        compiled(x[i], y[i])


def all_in_one_graph(step: Step, x: tf.Tensor, y: tf.Tensor) -> None:
    @tf.function
    def loop() -> None:
        for i in tf.range(len(x)):
            step(x[i], y[i])

    loop()


@pytest.mark.parametrize("plan", [DiLoCo(2), LocalSGD(3, warmup=2, overlap=1)], ids=["DiLoCo", "overlap"])
def test_every_way_to_loop_holds_the_same_rounds(driver: ContractDriver, rank: int, plan: Any) -> None:
    x, y = (tf.cast(tf.stack(parts), tf.float32) for parts in zip(*batches(7, rank), strict=True))
    ends = []
    for way in (eager, one_a_graph, all_in_one_graph):
        model = driver.model(initial_weights())
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9), model=model, sync=plan)
        optimizer.build(model.trainable_variables)

        def step(inputs: tf.Tensor, targets: tf.Tensor, model: Any = model, optimizer: Any = optimizer) -> None:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(inputs) - targets) ** 2)
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

        way(step, x, y)
        assert optimizer.sync.metrics()["steps"] == 7
        optimizer.sync.flush()
        ends.append(np.concatenate([w.ravel() for w in driver.weights(model)]))
        everyone = driver.everyones(ends[-1])
        assert (everyone == everyone[0]).all()
    np.testing.assert_allclose(ends[1], ends[0], atol=1e-6)
    np.testing.assert_allclose(ends[2], ends[0], atol=1e-6)
