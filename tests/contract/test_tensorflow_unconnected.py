"""Sources that only some ranks reach: nobody waits, and all ranks get the same gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import hvdscale.tensorflow as hvd
from tests.contract.drivers.tensorflow import Driver

ROWS = 3


def dense(table: tf.Variable) -> tf.Tensor:
    """Gradient: ones."""
    return tf.reduce_sum(table)


def sparse(table: tf.Variable) -> tf.Tensor:
    """Gradient: one at this rank's row, as ``tf.IndexedSlices``."""
    return tf.reduce_sum(tf.gather(table, [hvd.rank() % ROWS]))


def nothing(table: tf.Variable) -> tf.Tensor:
    return tf.constant(0.0)


# Step by step, what each rank does with the table; ranks beyond the last entry do as the last.
Plan = Sequence[Sequence[Callable[[tf.Variable], tf.Tensor]]]

AGREED_AT_FIRST: dict[str, Plan] = {
    "dense on the first rank": [[dense, nothing]],
    "dense on the others": [[nothing, dense]],
    "sparse on the first rank": [[sparse, nothing]],
    "sparse on the others": [[nothing, sparse]],
    "sparse and dense": [[sparse, dense]],
    "everywhere, then on one": [[dense], [dense, nothing], [nothing, dense], [nothing]],
    "sparse everywhere, then on one": [[sparse], [sparse, nothing], [nothing, sparse], [nothing]],
    "sparse, then dense on one": [[sparse], [dense, sparse], [sparse, nothing]],
}
COMES_LATE: dict[str, Plan] = {
    "nowhere, then on one": [[nothing], [nothing], [dense, nothing], [nothing, dense]],
    "nowhere, then sparse on one": [[nothing], [nothing, sparse], [sparse, nothing]],
}


def of_rank(step: Sequence[Any], rank: int) -> Any:
    return step[min(rank, len(step) - 1)]


def gradient_of(use: Any, rank: int) -> np.ndarray:
    result = np.zeros([ROWS, 1])
    if use is dense:
        result[:] = 1.0
    elif use is sparse:
        result[rank % ROWS] = 1.0
    return result


def run(plan: Plan, function: bool) -> None:
    table, other = tf.Variable(tf.zeros([ROWS, 1])), tf.Variable(0.0)

    def gradients(use: Callable[[tf.Variable], tf.Tensor]) -> Any:
        with tf.GradientTape() as tape:
            loss = use(table) + other * (hvd.rank() + 1.0)
        return hvd.DistributedGradientTape(tape).gradient(loss, [table, other])

    if function:
        gradients = tf.function(gradients)
    reached = False
    for step in plan:
        mine, shared = gradients(of_rank(step, hvd.rank()))
        uses = [of_rank(step, rank) for rank in range(hvd.size())]
        reached = reached or any(use is not nothing for use in uses)
        np.testing.assert_allclose(shared, (hvd.size() + 1) / 2)
        if hvd.size() == 1:
            assert (mine is None) == (uses[0] is nothing)
        else:
            assert (mine is None) == (not reached)
        if mine is not None:
            mean = np.mean([gradient_of(use, rank) for rank, use in enumerate(uses)], axis=0)
            np.testing.assert_allclose(tf.convert_to_tensor(mine), mean, rtol=1e-6)


@pytest.mark.parametrize("function", [False, True], ids=["eager", "function"])
@pytest.mark.parametrize("plan", AGREED_AT_FIRST)
def test_it_counts_as_zeros_where_it_is_missing(driver: Driver, plan: str, function: bool) -> None:
    run(AGREED_AT_FIRST[plan], function)


@pytest.mark.parametrize("plan", COMES_LATE)
def test_eagerly_it_may_come_late(driver: Driver, plan: str) -> None:
    run(COMES_LATE[plan], function=False)


@pytest.mark.parametrize("dtypes", [(tf.int32, tf.int64), (tf.int64, tf.int32)], ids=str)
def test_row_numbers_may_differ_in_type(driver: Driver, dtypes: tuple[tf.DType, ...]) -> None:
    dtype = of_rank(dtypes, hvd.rank())
    slices = tf.IndexedSlices(tf.ones([1, 1]), tf.constant([hvd.rank() % ROWS], dtype), tf.constant([ROWS, 1], dtype))
    reduced = hvd.allreduce(slices, op=hvd.Sum)
    assert reduced.indices.dtype == dtype
    total = np.sum([gradient_of(sparse, rank) for rank in range(hvd.size())], axis=0)
    np.testing.assert_allclose(tf.convert_to_tensor(reduced), total)


@pytest.mark.parametrize("function", [False, True], ids=["eager", "function"])
def test_no_sources_are_no_gradients(driver: Driver, function: bool) -> None:
    x = tf.Variable(1.0)

    def gradients() -> Any:
        with tf.GradientTape() as tape:
            loss = 2.0 * x
        return hvd.DistributedGradientTape(tape, groups=2).gradient(loss, [])

    assert (tf.function(gradients) if function else gradients)() == []
    assert hvd.broadcast_variables([], root_rank=0) is None
    assert hvd.reduce_gradients([], hvd.Reduction()) == []
    assert hvd.grouped_allreduce([]) == []


def test_no_sources_on_one_rank_only_are_told(driver: Driver) -> None:
    x = tf.Variable(1.0)
    sources = [x] if hvd.rank() == 0 else []
    with tf.GradientTape() as tape:
        loss = 2.0 * x
    tape = hvd.DistributedGradientTape(tape)
    if hvd.size() == 1:
        assert len(tape.gradient(loss, sources)) == 1
        return
    with pytest.raises(hvd.DesyncError, match="number of parameters = 0"):
        tape.gradient(loss, sources)


def test_a_list_of_gradients_is_reduced_by_hand(driver: Driver) -> None:
    mine = [tf.constant([hvd.rank() + 1.0]), None, tf.constant(hvd.rank() + 1.0)]
    first, missing, second = hvd.reduce_gradients(mine, hvd.Reduction(op="sum"))
    total = hvd.size() * (hvd.size() + 1) / 2
    assert missing is None
    np.testing.assert_allclose([first[0], second], [total, total])
