"""Gradients that only some ranks have, sparse ones among them, and no gradients at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import pytest

from hvdscale.errors import DesyncError
from tests.contract.driver import ContractDriver
from tests.contract.keras_reference import BACKEND, assert_close, assert_equal_everywhere, own_batches

SGD = keras.optimizers.SGD
ROWS = 3

# Step by step what each rank has for the table; ranks beyond the last entry have what the last has.
DENSE: dict[str, list[list[str]]] = {
    "on the first rank": [["dense", "none"]],
    "on the others": [["none", "dense"]],
    "everywhere, then on one": [["dense"], ["dense", "none"], ["none", "dense"]],
}
SPARSE: dict[str, list[list[str]]] = {
    "sparse on the first rank": [["sparse", "none"]],
    "sparse on the others": [["none", "sparse"]],
    "sparse everywhere, then on one": [["sparse"], ["sparse", "none"], ["none", "sparse"]],
    "sparse and dense": [["sparse", "dense"], ["dense", "sparse"]],
    "sparse, then dense on one": [["sparse"], ["sparse", "dense"], ["none", "sparse"]],
}
PLANS = {**DENSE, **SPARSE} if BACKEND == "tensorflow" else DENSE


def of_rank(step: Sequence[str], rank: int) -> str:
    return step[min(rank, len(step) - 1)]


def as_array(kind: str, rank: int) -> np.ndarray:
    result = np.zeros([ROWS, 2], np.float32)
    result[{"none": [], "dense": list(range(ROWS)), "sparse": [rank % ROWS]}[kind]] = 1.0
    return result


def gradient(kind: str, rank: int) -> Any:
    if kind == "none":
        return None
    if kind == "dense":
        return keras.ops.convert_to_tensor(as_array(kind, rank))
    import tensorflow as tf

    return tf.IndexedSlices(tf.ones([1, 2]), tf.constant([rank % ROWS]), tf.constant([ROWS, 2]))


@pytest.mark.parametrize("arguments", [{}, {"sparse_as_dense": True}, {"backward_passes_per_step": 2}], ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_it_counts_as_zeros_where_it_is_missing(driver: ContractDriver, plan: str, arguments: dict[str, Any]) -> None:
    hvd = driver.hvd
    passes = arguments.get("backward_passes_per_step", 1)
    steps = [step for step in PLANS[plan] for _ in range(passes)]
    table, other = keras.Variable(np.zeros([ROWS, 2], np.float32)), keras.Variable(0.0)
    optimizer = hvd.DistributedOptimizer(SGD(1.0), **arguments)
    for step in steps:
        mine = gradient(of_rank(step, hvd.rank()), hvd.rank())
        optimizer.apply([mine, keras.ops.convert_to_tensor(hvd.rank() + 1.0)], [table, other])
    expected = -sum(
        np.mean([as_array(of_rank(step, rank), rank) for rank in range(hvd.size())], axis=0) for step in steps
    )
    np.testing.assert_allclose(keras.ops.convert_to_numpy(table), expected, rtol=1e-6)
    np.testing.assert_allclose(float(other), -len(steps) * (hvd.size() + 1) / 2, rtol=1e-6)
    assert_equal_everywhere([table, other])


def test_no_variables_are_no_step(driver: ContractDriver) -> None:
    hvd = driver.hvd
    optimizer = hvd.DistributedOptimizer(SGD(0.1))
    optimizer.apply([], [])
    hvd.broadcast_variables([], root_rank=0)
    assert hvd.reduce_gradients([], hvd.Reduction()) == []
    model = keras.Sequential([keras.Input((3,)), keras.layers.Flatten()])
    model.compile(hvd.DistributedOptimizer(SGD(0.1), model=model), "mse")
    x, _ = own_batches(1)[0]
    assert np.isfinite(model.evaluate(x, x, verbose=0))
    assert_close([keras.ops.convert_to_numpy(model(x))], [x], 0.0)


def test_no_variables_on_one_rank_only_are_told(driver: ContractDriver) -> None:
    hvd = driver.hvd
    optimizer = hvd.DistributedOptimizer(SGD(0.1))
    count = 1 if hvd.rank() == 0 else 0
    given = [keras.ops.ones(()) for _ in range(count)], [keras.Variable(0.0) for _ in range(count)]
    if hvd.size() == 1:
        optimizer.apply(*given)
        return
    with pytest.raises(DesyncError, match="number of parameters = 0"):
        optimizer.apply(*given)


def test_a_list_of_gradients_is_reduced_by_hand(driver: ContractDriver) -> None:
    hvd = driver.hvd
    mine = [keras.ops.full((2,), hvd.rank() + 1.0), None]
    total, missing = hvd.reduce_gradients(mine, hvd.Reduction(op="sum"))
    assert missing is None
    np.testing.assert_allclose(keras.ops.convert_to_numpy(total), hvd.size() * (hvd.size() + 1) / 2)
