"""shard_dataset on real ranks: every sample once over all ranks, and a state that counts what was taken."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdscale.tensorflow as hvd
from tests.contract.data import all_numbers, everyones
from tests.contract.driver import ContractDriver

N = 203
POLICIES = ("ordered", "random", "hash")
WORKERS = (0, 2)


def records(start: int) -> Iterator[int]:
    return iter(range(start, N))


def stream(policy: str, shards: int) -> hvd.ShardStream:
    own: dict[str, Any] = {"ordered": {}, "random": {"window": 40}, "hash": {"key": lambda i: f"key {i % 60}"}}[policy]
    return hvd.ShardStream(shards, policy, seed=3, **own)


def numbers(batches: Any) -> list[int]:
    return [int(sample) for batch in batches for sample in batch]


@tf.function
def total(dataset: tf.data.Dataset) -> tf.Tensor:
    added = tf.constant(0, tf.int64)
    for batch in dataset:
        added += tf.reduce_sum(batch)
    return added


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("policy", POLICIES)
class TestPlans:
    def test_the_state_counts_what_was_taken_in_the_plans_order(
        self, rank: int, size: int, policy: str, workers: int
    ) -> None:
        plan = hvd.ShardPlan(N, size, policy, seed=1)
        dataset, reader = hvd.shard_dataset(np.arange(N), plan, 4, workers=workers), plan.reader(rank, 4)
        for epoch in range(2):
            assert dataset.epoch == epoch
            assert len(dataset) == -(-plan.size(rank, epoch) // 4)
            for data in dataset:
                batch = next(reader)
                assert data.numpy().tolist() == batch.indices.tolist()
                assert dataset.state_dict() == reader.state_dict()
                assert (dataset.batch.epoch, dataset.batch.step) == (batch.epoch, batch.step)
            hvd.verify_epoch(dataset)

    def test_exactly_once_over_a_stop_of_ranks_that_got_differently_far(
        self, driver: ContractDriver, rank: int, size: int, policy: str, workers: int
    ) -> None:
        plan = hvd.ShardPlan(N, size, policy, seed=1)
        dataset = hvd.shard_dataset(np.arange(N), plan, 4, workers=workers)
        read = numbers(itertools.islice(dataset, 2 + 3 * rank))
        rest = hvd.ShardPlan.resume(everyones(driver, dataset.state_dict()), size + 1)
        for shard in range(rank, size + 1, size):
            read += numbers(hvd.shard_dataset(np.arange(N), rest, 4, shard=shard, workers=workers))
        assert all_numbers(driver, read) == list(range(N))

    def test_an_iteration_left_early_is_gone_on_with(self, rank: int, size: int, policy: str, workers: int) -> None:
        plan = hvd.ShardPlan(N, size, policy, seed=1)
        dataset = hvd.shard_dataset(np.arange(N), plan, 4, workers=workers)
        assert numbers(itertools.islice(dataset, 3)) + numbers(dataset) == plan.indices(rank).tolist()


@pytest.mark.parametrize("policy", POLICIES)
class TestStreams:
    def test_every_record_once_in_every_pass(self, driver: ContractDriver, size: int, policy: str) -> None:
        dataset = hvd.shard_dataset(records, stream(policy, size), 8)
        for epoch in range(2):
            assert dataset.epoch == epoch
            assert all_numbers(driver, numbers(dataset)) == list(range(N))

    def test_exactly_once_over_a_stop(self, driver: ContractDriver, rank: int, size: int, policy: str) -> None:
        dataset = hvd.shard_dataset(records, stream(policy, size), 4)
        read = numbers(itertools.islice(dataset, 2 + 3 * rank))
        rest = stream(policy, size).resume(everyones(driver, dataset.state_dict()), size + 1)
        for shard in range(rank, size + 1, size):
            read += numbers(hvd.shard_dataset(records, rest, 4, shard=shard))
        assert all_numbers(driver, read) == list(range(N))


class TestInsideFunctions:
    def test_a_loop_over_the_dataset(self, rank: int, size: int) -> None:
        plan = hvd.ShardPlan(N, size, seed=1)
        dataset = hvd.shard_dataset(np.arange(N), plan, 8, workers=2)
        for epoch in range(2):
            assert int(total(dataset)) == plan.indices(rank, epoch).sum()
            assert dataset.epoch == epoch + 1

    def test_an_iterator_counts_exactly(self, size: int) -> None:
        dataset = hvd.shard_dataset(np.arange(N), hvd.ShardPlan(N, size), 4)

        @tf.function
        def some(iterator: Any) -> None:
            for _ in tf.range(3):
                next(iterator)

        some(iter(dataset))
        assert dataset.state_dict()["step"] == 3

    def test_break_takes_one_more(self, size: int) -> None:
        dataset = hvd.shard_dataset(np.arange(N), hvd.ShardPlan(N, size), 4)

        @tf.function
        def some() -> tf.Tensor:
            seen = tf.constant(0)
            for _ in dataset:
                seen += 1
                if seen == 3:
                    break
            return seen

        assert int(some()) == 3
        assert dataset.state_dict()["step"] == 4


class StopAfter(keras.callbacks.Callback):
    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.model.stop_training = batch == 4


def test_fit_is_counted(rank: int, size: int) -> None:
    rows = np.arange(N, dtype=np.float32).reshape(-1, 1)
    plan = hvd.ShardPlan(N, size, seed=1)
    dataset, reader = hvd.shard_dataset((rows, rows), plan, 8), plan.reader(rank, 8)
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(dataset, verbose=0, shuffle=False)
    for _ in range(reader.steps()):
        next(reader)
    assert dataset.state_dict() == reader.state_dict()
    model.fit(dataset, verbose=0, shuffle=False, callbacks=[StopAfter()])
    for _ in range(5):
        next(reader)
    assert dataset.state_dict() == reader.state_dict()


def test_repeat_goes_on_through_the_epochs(rank: int, size: int) -> None:
    plan = hvd.ShardPlan(N, size, seed=1)
    dataset = hvd.shard_dataset(np.arange(N), plan, 8, workers=2)
    assert numbers(dataset.repeat(2)) == [*plan.indices(rank, 0), *plan.indices(rank, 1)]
    assert dataset.epoch == 2
    hvd.verify_epoch(dataset)


def test_fit_with_validation_goes_through_both(size: int) -> None:
    rows = np.arange(N, dtype=np.float32).reshape(-1, 1)
    plan = hvd.ShardPlan(N, size, seed=1)
    dataset, others = (hvd.shard_dataset((rows, rows), plan, 8) for _ in range(2))
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(dataset, epochs=2, verbose=0, validation_data=others)
    assert (dataset.epoch, dataset.state_dict()["step"], others.epoch) == (2, 0, 2)
    hvd.verify_epoch(dataset)


def test_ranks_balance(driver: ContractDriver, size: int) -> None:
    plan = hvd.BalancedPlan(hvd.ShardPlan(N, size, seed=1), np.arange(N) % 50 + 1)
    dataset = hvd.shard_dataset(np.arange(N), plan, 16)
    assert all_numbers(driver, numbers(dataset)) == list(range(N))
    hvd.verify_epoch(dataset)


DATA: dict[str, Any] = {
    "matrix": (np.arange(2 * N).reshape(N, 2), lambda b: b[:, 0] // 2),
    "tensor": (tf.range(N), lambda b: b),
    "tuple": ((np.arange(N), tf.range(N) * 3), lambda b: b[1] // 3),
    "dictionary": ({"x": np.arange(N), "y": -np.arange(N)}, lambda b: -b["y"]),
    "list": (list(range(N)), lambda b: b),
    "samples": ([(i, float(i)) for i in range(N)], lambda b: tf.cast(b[1], tf.int64)),
    "strings": (np.array([str(i) for i in range(N)]), lambda b: tf.strings.to_number(b, tf.int64)),
}


@pytest.mark.parametrize("kind", DATA)
def test_what_data_may_be(rank: int, size: int, kind: str) -> None:
    data, samples_of = DATA[kind]
    plan = hvd.ShardPlan(N, size, seed=4)
    batches = list(hvd.shard_dataset(data, plan, 16))
    assert np.concatenate([samples_of(batch) for batch in batches]).tolist() == plan.indices(rank).tolist()


def test_auto_sharding_is_off(size: int) -> None:
    options = hvd.shard_dataset(np.arange(N), hvd.ShardPlan(N, size), 4).options()
    assert options.experimental_distribute.auto_shard_policy == tf.data.experimental.AutoShardPolicy.OFF


def test_an_iterator_that_was_overtaken_is_refused(size: int) -> None:
    dataset = hvd.shard_dataset(np.arange(N), hvd.ShardPlan(N, size), 4)
    old, new = iter(dataset), iter(dataset)
    next(old)
    next(new)
    with pytest.raises(tf.errors.OpError, match="has been iterated again since"):
        next(old)


@pytest.mark.parametrize("signature", [3, [], (tf.TensorSpec([None]), "x")])
def test_a_signature_is_of_tensors(size: int, signature: Any) -> None:
    with pytest.raises(hvd.PlanError, match=r"signature is tf\.TensorSpec"):
        hvd.shard_dataset(np.arange(N), hvd.ShardPlan(N, size), 4, signature=signature)


def test_a_source_that_gives_no_records_is_refused(size: int) -> None:
    with pytest.raises(hvd.PlanError, match="one by one; it gave 5"):
        hvd.shard_dataset(lambda start: 5, stream("ordered", size), 4)


def test_a_map_behind_it_draws_no_batch_ahead(size: int) -> None:
    dataset = hvd.shard_dataset(np.arange(N), hvd.ShardPlan(N, size), 2)
    for taken, _ in enumerate(dataset.map(lambda batch: batch + 0), start=1):
        time.sleep(0.05)  # as a training step: time enough to draw the next
        assert dataset.state_dict()["step"] == taken
        if taken == 3:
            break


def test_texts_and_bytes_arrive_whole() -> None:
    records = [b"a\0\0", b"\0"]
    stream_of = hvd.shard_dataset(lambda start: iter(records[start:]), hvd.ShardStream(1), 2, shard=0)
    for dataset in (stream_of, hvd.shard_dataset(records, hvd.ShardPlan(2, 1, "ordered"), 2, shard=0)):
        assert [batch.numpy().tolist() for batch in dataset] == [records]
    for words in (np.array(["a", "\u00e9"]), ["a", "\u00e9"]):
        (batch,) = hvd.shard_dataset(words, hvd.ShardPlan(2, 1, "ordered"), 2, shard=0)
        assert [text.decode() for text in batch.numpy().tolist()] == ["a", "\u00e9"]
