"""Collectives: Keras variables, every dtype, lists of any mixture, and gradients through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdscale.tensorflow as hvd
from tests.contract.drivers.tensorflow import Driver

DTYPES = ["float16", "bfloat16", "float32", "float64", "int8", "uint8", "int16", "uint16", "int32", "int64"]


def numpy(tensor: Any) -> np.ndarray:
    return np.asarray(tf.cast(tf.convert_to_tensor(tensor), tf.float64))


def total() -> float:
    return hvd.size() * (hvd.size() + 1) / 2


COLLECTIVES: dict[str, tuple[Callable[[Any], Any], Callable[[], np.ndarray]]] = {
    "allreduce": (lambda t: hvd.allreduce(t, op=hvd.Sum), lambda: np.full([4, 2], total())),
    "max": (lambda t: hvd.allreduce(t, op=hvd.Max), lambda: np.full([4, 2], hvd.size())),
    "grouped_allreduce": (lambda t: hvd.grouped_allreduce([t, t], op=hvd.Sum)[1], lambda: np.full([4, 2], total())),
    "allgather": (hvd.allgather, lambda: np.repeat(np.arange(hvd.size()) + 1.0, 4)[:, None] * np.ones([1, 2])),
    "grouped_allgather": (
        lambda t: hvd.grouped_allgather([t, t])[1],
        lambda: np.repeat(np.arange(hvd.size()) + 1.0, 4)[:, None] * np.ones([1, 2]),
    ),
    "broadcast": (lambda t: hvd.broadcast(t, 0), lambda: np.ones([4, 2])),
    "alltoall": (
        hvd.alltoall,
        lambda: np.repeat(np.arange(hvd.size()) + 1.0, 4 // hvd.size())[:, None] * np.ones([1, 2]),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", COLLECTIVES)
def test_every_dtype(driver: Driver, name: str, dtype: str) -> None:
    collective, expected = COLLECTIVES[name]
    result = collective(tf.cast(tf.fill([4, 2], hvd.rank() + 1), dtype))
    assert result.dtype.name == dtype
    np.testing.assert_array_equal(numpy(result), expected())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int32"])
def test_reducescatter(driver: Driver, dtype: str) -> None:
    given = tf.cast(tf.fill([4, 2], hvd.rank() + 1), dtype)
    single = hvd.reducescatter(given, op=hvd.Sum)
    first, second = hvd.grouped_reducescatter([given, tf.cast(given, tf.float64)], op=hvd.Sum)
    for share in (single, first, second):
        np.testing.assert_array_equal(numpy(share), np.full([4 // hvd.size(), 2], total()))
    assert single.dtype.name == first.dtype.name == dtype


@pytest.mark.parametrize("name", COLLECTIVES)
def test_keras_variables(driver: Driver, name: str) -> None:
    collective, expected = COLLECTIVES[name]
    result = collective(keras.Variable(np.full([4, 2], hvd.rank() + 1.0)))
    np.testing.assert_array_equal(numpy(result), expected())


def slices(rows: list[int], width: int, height: int) -> tf.IndexedSlices:
    values = tf.fill([len(rows), width], hvd.rank() + 1.0)
    return tf.IndexedSlices(values, tf.constant(rows, tf.int64), tf.constant([height, width], tf.int64))


MIXTURES = {
    "dense first": "dss",
    "sparse first": "sds",
    "sparse between": "dsd",
    "sparse only": "ss",
    "dense only": "dd",
    "nothing": "",
}


@pytest.mark.parametrize("mode", ["eager", "function"])
@pytest.mark.parametrize("op", ["Average", "Sum"])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_grouped_allreduce_of_mixed_lists(driver: Driver, mixture: str, op: str, mode: str) -> None:
    rank, size = hvd.rank(), hvd.size()

    def reduced() -> list[Any]:
        given: list[Any] = []
        for i, kind in enumerate(MIXTURES[mixture]):
            given.append(slices([rank, 4], 2 + i, 5 + i) if kind == "s" else tf.fill([2 + i], rank + 1.0))
        results = hvd.grouped_allreduce(given, op=getattr(hvd, op), prescale_factor=2.0)
        return [tf.convert_to_tensor(r) for r in results]

    results = (tf.function(reduced) if mode == "function" else reduced)()
    factor = 2.0 / (size if op == "Average" else 1)
    for i, (kind, result) in enumerate(zip(MIXTURES[mixture], results, strict=True)):
        expected = np.full([2 + i], total() * factor)
        if kind == "s":
            expected = np.zeros([5 + i, 2 + i])
            for r in range(size):
                expected[r] += (r + 1) * factor
                expected[4] += (r + 1) * factor
        np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_sparse_tensors_have_no_maximum(driver: Driver) -> None:
    with pytest.raises(hvd.PlanError, match="IndexedSlices"):
        hvd.allreduce(slices([0], 2, 3), op=hvd.Max)


def test_scales_and_compression(driver: Driver) -> None:
    x = tf.fill([3], hvd.rank() + 1.0)
    result = hvd.allreduce(x, op=hvd.Sum, prescale_factor=0.5, postscale_factor=4.0, compression=hvd.Compression.fp16)
    assert result.dtype == tf.float32
    np.testing.assert_allclose(result, np.full([3], 2 * total()))


def test_gradients_flow_through(driver: Driver) -> None:
    weight = hvd.rank() + 1.0
    x = tf.Variable(tf.ones([2], tf.bfloat16))
    with tf.GradientTape(persistent=True) as tape:
        summed = weight * tf.reduce_sum(tf.cast(hvd.allreduce(x, op=hvd.Sum), tf.float32))
        gathered = weight * tf.reduce_sum(tf.cast(hvd.allgather(x), tf.float32))
        scattered = weight * tf.reduce_sum(hvd.reducescatter(tf.cast(tf.tile(x, [hvd.size()]), tf.float32), op=hvd.Sum))
        received = weight * tf.reduce_sum(tf.cast(hvd.broadcast(x, 0), tf.float32))
    np.testing.assert_allclose(numpy(tape.gradient(summed, x)), np.full([2], total()))
    np.testing.assert_allclose(numpy(tape.gradient(gathered, x)), np.full([2], total() / hvd.size()))
    np.testing.assert_allclose(numpy(tape.gradient(scattered, x)), np.full([2], hvd.size() * total()))
    expected = total() / hvd.size() if hvd.rank() == 0 else 0.0
    np.testing.assert_allclose(numpy(tape.gradient(received, x)), np.full([2], expected))


def test_alltoall_with_splits(driver: Driver) -> None:
    rank, size = hvd.rank(), hvd.size()
    splits = [i + 1 for i in range(size)]
    rows, received = hvd.alltoall(tf.fill([sum(splits)], tf.cast(rank, tf.bfloat16)), splits)
    np.testing.assert_array_equal(received, [rank + 1] * size)
    np.testing.assert_array_equal(numpy(rows), np.repeat(np.arange(size), rank + 1))


def test_inside_a_process_set(driver: Driver) -> None:
    members = range(0, hvd.size(), 2)
    if hvd.rank() in members:
        given = [tf.ones([2]), slices([1], 2, 3)]
        result = hvd.grouped_allreduce(given, op=hvd.Sum, process_set=driver.even_ranks)
        np.testing.assert_allclose(result[0], [len(members)] * 2)
        np.testing.assert_allclose(tf.convert_to_tensor(result[1])[1], [sum(r + 1.0 for r in members)] * 2)


def test_objects(driver: Driver) -> None:
    assert hvd.broadcast_object({"rank": hvd.rank()}, 0) == {"rank": 0}
    assert hvd.broadcast_object_fn(0)([hvd.rank()]) == [0]
    assert hvd.allgather_object(hvd.rank() * "x") == [r * "x" for r in range(hvd.size())]


def test_objects_whose_types_differ_between_ranks(driver: Driver) -> None:
    assert hvd.broadcast_object({"epoch": 3} if hvd.rank() == 0 else None, 0) == {"epoch": 3}
    assert hvd.allgather_object("first" if hvd.rank() == 0 else hvd.rank()) == ["first", *range(1, hvd.size())]
