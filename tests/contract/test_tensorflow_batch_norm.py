"""Synchronised batch normalisation equals the plain layer on the batches of all ranks."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdscale.tensorflow as hvd
from tests.contract.drivers.tensorflow import Driver

CHANNELS = 3

# Rows of each rank; ranks beyond the table take the last entry.
BATCHES = {"even": [4, 4], "uneven": [2, 7], "empty on rank 0": [0, 5]}


def inputs(rank: int, rows: int, spatial: tuple[int, ...] = ()) -> np.ndarray:
    """Far from zero, where E[x^2] - E[x]^2 would lose the variance."""
    rng = np.random.default_rng([7, rank])
    return (rng.normal(size=(rows, *spatial, CHANNELS)) + 300.0 * (rank + 1)).astype(np.float32)


def rows_of(sizes: list[int], rank: int) -> int:
    return sizes[min(rank, len(sizes) - 1)]


@pytest.mark.parametrize("mode", ["eager", "function"])
@pytest.mark.parametrize("spatial", [(), (2, 2)], ids=["rows", "images"])
@pytest.mark.parametrize("batch", BATCHES)
def test_equals_one_process_with_the_whole_batch(
    driver: Driver, batch: str, spatial: tuple[int, ...], mode: str
) -> None:
    sizes = BATCHES[batch]
    every = [inputs(r, rows_of(sizes, r), spatial) for r in range(hvd.size())]
    whole = np.concatenate(every)
    if not len(whole):
        whole = every[0] = inputs(0, 3, spatial)  # alone there is no other rank that has rows
    weights = np.random.default_rng(3).normal(size=whole.shape).astype(np.float32)
    first = sum(len(e) for e in every[: hvd.rank()])
    mine = slice(first, first + len(every[hvd.rank()]))

    def run(layer: keras.layers.Layer, x: np.ndarray, weight: np.ndarray) -> list[tf.Tensor]:
        x = tf.constant(x)

        def body() -> list[tf.Tensor]:
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True)
                loss = tf.reduce_sum(y * weight)
            return [y, *tape.gradient(loss, [x, *(v.value for v in layer.trainable_variables)])]

        layer.build(x.shape)
        return (tf.function(body) if mode == "function" else body)()

    ours, theirs = hvd.SyncBatchNormalization(), keras.layers.BatchNormalization()
    y, dx, dgamma, dbeta = run(ours, whole[mine], weights[mine])
    y_all, dx_all, dgamma_all, dbeta_all = run(theirs, whole, weights)
    np.testing.assert_allclose(y, y_all[mine], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dx, dx_all[mine], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(hvd.allreduce(dgamma, op=hvd.Sum), dgamma_all, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(hvd.allreduce(dbeta, op=hvd.Sum), dbeta_all, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(ours.moving_mean, theirs.moving_mean, rtol=1e-5)
    np.testing.assert_allclose(ours.moving_variance, theirs.moving_variance, rtol=1e-3)


def test_parallel_layers_in_a_function_do_not_meet(driver: Driver) -> None:
    if hvd.rank() == 0:
        hvd.SyncBatchNormalization()  # moves Keras's automatic names
    layers = [hvd.SyncBatchNormalization(momentum=0.0) for _ in range(3)]
    x = tf.constant(inputs(hvd.rank(), 4))
    for layer in layers:
        layer.build(x.shape)

    @tf.function
    def forward() -> list[tf.Tensor]:
        return [layer(x + shift, training=True) for shift, layer in enumerate(layers)]

    forward()
    mean = np.concatenate([inputs(r, 4) for r in range(hvd.size())]).mean(0)
    for shift, layer in enumerate(layers):
        np.testing.assert_allclose(layer.moving_mean, mean + shift, rtol=1e-5)


def test_masked_steps_do_not_count(driver: Driver) -> None:
    x = inputs(hvd.rank(), 2, (3,))
    mask = np.array([[1, 1, 0], [1, 0, 0]], bool)
    layer = hvd.SyncBatchNormalization(momentum=0.0)
    layer(x, training=True, mask=mask)
    kept = np.concatenate([inputs(r, 2, (3,))[mask] for r in range(hvd.size())])
    np.testing.assert_allclose(layer.moving_mean, kept.mean(0), rtol=1e-5)
    np.testing.assert_allclose(layer.moving_variance, kept.var(0), rtol=1e-3)


def test_inference_uses_the_moving_statistics_alone(driver: Driver) -> None:
    layer, plain = hvd.SyncBatchNormalization(), keras.layers.BatchNormalization()
    x = inputs(hvd.rank(), 3)
    if hvd.rank() == 0:  # nobody else calls: nothing may be exchanged
        np.testing.assert_array_equal(layer(x, training=False), plain(x, training=False))


def test_in_fit_and_through_serialisation(driver: Driver) -> None:
    model = keras.Sequential(
        [keras.Input((CHANNELS,)), hvd.SyncBatchNormalization(momentum=0.5), hvd.SyncBatchNormalization()]
    )
    model.compile(loss="mse", optimizer=keras.optimizers.SGD(0.0))
    x = inputs(hvd.rank(), 4)
    model.fit(x, x, batch_size=4, epochs=1, verbose=0)
    expected = 0.5 * np.concatenate([inputs(r, 4) for r in range(hvd.size())]).mean(0)
    np.testing.assert_allclose(model.layers[0].moving_mean, expected, rtol=1e-5)
    twin = keras.Sequential.from_config(model.get_config())
    assert isinstance(twin.layers[0], hvd.SyncBatchNormalization)
    assert twin.layers[0].momentum == 0.5


def test_there_is_no_fused_form(driver: Driver) -> None:
    with pytest.raises(hvd.PlanError, match="fused"):
        hvd.SyncBatchNormalization(fused=True)
