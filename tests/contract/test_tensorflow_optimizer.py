"""``DistributedOptimizer`` of TensorFlow 1 and of Keras optimizers."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdscale.tensorflow as hvd
from tests.contract.drivers.tensorflow import Driver

v1 = tf.compat.v1


def mean_of_ranks() -> float:
    return (hvd.size() + 1) / 2


@pytest.mark.parametrize(
    ("arguments", "steps", "expected"),
    [
        ({}, 2, lambda m: 1 - 2 * m),
        ({"op": hvd.Sum}, 1, lambda m: 1 - m * hvd.size()),
        ({"groups": 1, "gradient_predivide_factor": 2.0}, 1, lambda m: 1 - m),
        ({"backward_passes_per_step": 2}, 4, lambda m: 1 - 4 * m),
        ({"backward_passes_per_step": 2, "average_aggregated_gradients": True}, 4, lambda m: 1 - 2 * m),
    ],
    ids=str,
)
def test_training_in_a_graph(driver: Driver, arguments: dict[str, Any], steps: int, expected: Any) -> None:
    with tf.Graph().as_default(), v1.Session() as session:
        w = v1.get_variable("w", initializer=tf.constant([1.0, 1.0]))
        b = v1.get_variable("b", initializer=tf.constant(1.0))
        optimizer = hvd.DistributedOptimizer(v1.train.MomentumOptimizer(1.0, 0.0), **arguments)
        step = optimizer.minimize((hvd.rank() + 1.0) * (tf.reduce_sum(w) + b))
        session.run([v1.global_variables_initializer(), v1.local_variables_initializer()])
        for _ in range(steps):
            session.run(step)
        np.testing.assert_allclose(session.run(w), np.full([2], expected(mean_of_ranks())), rtol=1e-6)
        np.testing.assert_allclose(session.run(b), expected(mean_of_ranks()), rtol=1e-6)
        assert optimizer.get_slot_names() == ["momentum"]
        assert len(optimizer.variables()) == 2


def test_sparse_gradients_and_local_variables_in_a_graph(driver: Driver) -> None:
    with tf.Graph().as_default(), v1.Session() as session:
        w = v1.get_variable("w", initializer=tf.zeros([3, 1]))
        own = v1.get_variable("own", initializer=tf.constant(0.0))
        optimizer = hvd.DistributedOptimizer(v1.train.GradientDescentOptimizer(1.0))
        optimizer.register_local_var(own)
        loss = tf.reduce_sum(tf.gather(w, [hvd.rank() % 3])) + own * (hvd.rank() + 1.0)
        step = optimizer.minimize(loss)
        session.run(v1.global_variables_initializer())
        session.run(step)
        expected = np.zeros([3, 1])
        for r in range(hvd.size()):
            expected[r % 3] -= 1.0 / hvd.size()
        np.testing.assert_allclose(session.run(w), expected, rtol=1e-6)
        assert session.run(own) == pytest.approx(-(hvd.rank() + 1.0) / hvd.size())


def test_training_eagerly(driver: Driver) -> None:
    w = tf.Variable([1.0])
    optimizer = hvd.DistributedOptimizer(v1.train.GradientDescentOptimizer(1.0))
    optimizer.minimize(lambda: (hvd.rank() + 1.0) * w, var_list=[w])
    np.testing.assert_allclose(w, [1.0 - mean_of_ranks()])


def test_autograph_leaves_what_a_step_sets_up_alone(driver: Driver) -> None:
    seen = []

    class Watching(keras.optimizers.SGD):
        def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
            seen.append(tf.__internal__.autograph.control_status_ctx().status.name)
            super().update_step(gradient, variable, learning_rate)

    weight = keras.Variable([1.0, 1.0])
    optimizer = hvd.DistributedOptimizer(Watching(0.5))

    @tf.function
    def step() -> None:
        optimizer.apply([tf.constant([1.0, 1.0]) * (hvd.rank() + 1.0)], [weight])

    step()
    assert set(seen) == {"DISABLED"}  # else it rewrites this package, for most of a minute
    np.testing.assert_allclose(weight.numpy(), 1 - 0.5 * mean_of_ranks())


def test_a_keras_optimizer_applies_the_mean_of_ranks(driver: Driver) -> None:
    w = keras.Variable([1.0])
    optimizer = keras.optimizers.SGD(1.0)
    assert hvd.DistributedOptimizer(optimizer) is optimizer
    optimizer.apply([tf.constant([hvd.rank() + 1.0])], [w])
    np.testing.assert_allclose(w, [1.0 - mean_of_ranks()])


def sgd() -> Any:
    return v1.train.GradientDescentOptimizer(0.1)


REFUSED = {
    "a model for TensorFlow 1": (lambda: hvd.DistributedOptimizer(sgd(), model=object()), "Keras optimizers"),
    "no optimizer": (lambda: hvd.DistributedOptimizer(0.1), "got builtins.float"),
    "wrapped twice": (lambda: hvd.DistributedOptimizer(hvd.DistributedOptimizer(sgd())), "Wrap it once"),
    "adasum": (lambda: hvd.DistributedOptimizer(sgd(), op=hvd.Adasum), "Adasum"),
    "eager accumulation": (lambda: hvd.DistributedOptimizer(sgd(), backward_passes_per_step=2), "needs a graph"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused(driver: Driver, what: str) -> None:
    make, text = REFUSED[what]
    with pytest.raises(hvd.PlanError, match=text):
        make()
