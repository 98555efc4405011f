"""Rounds among the things a Keras script does: fit, schedules, clipping, accumulation, half precision, saving."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from hvdscale.sync import DiLoCo, Gossip, LocalSGD
from tests.contract import oracle
from tests.contract.driver import ContractDriver
from tests.contract.keras_reference import (
    BACKEND,
    assert_close,
    assert_differs_somewhere,
    assert_equal_everywhere,
    fit,
    gradients,
    network,
    own_batches,
    plain_weights,
    weights_of,
)

START = oracle.initial_weights()
SGD, Adam = keras.optimizers.SGD, keras.optimizers.Adam

OPTIMIZERS: dict[str, tuple[Callable[[], Any], int]] = {  # and how many updates they make of four batches
    "schedule": (lambda: SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5), global_clipnorm=0.5), 4),
    "accumulation": (lambda: Adam(0.01, gradient_accumulation_steps=2, clipnorm=0.3), 2),
    "loss scale": (lambda: keras.optimizers.LossScaleOptimizer(SGD(0.1), initial_scale=8.0), 4),
    "adamw": (lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1, use_ema=True), 4),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_between_rounds_a_rank_trains_as_plain_keras_does_and_a_flush_takes_the_mean(
    driver: ContractDriver, kind: str
) -> None:
    make, updates = OPTIMIZERS[kind]
    model = network(START)
    optimizer = driver.hvd.DistributedOptimizer(make(), model=model, sync=LocalSGD(100))
    fit(model, optimizer, own_batches(4))
    alone = plain_weights(make(), own_batches(4), START)
    assert_close(weights_of(model), alone)
    assert optimizer.sync.metrics()["steps"] == updates
    optimizer.sync.flush()
    assert_close(weights_of(model), [driver.everyones(w).mean(axis=0) for w in alone])
    assert_equal_everywhere(model.weights)


def test_several_steps_per_execution_hold_the_same_rounds(driver: ContractDriver) -> None:
    ends = []
    for steps in (1, 3) if BACKEND == "tensorflow" else (1, 1):  # on torch, Keras takes 1 only
        model = network(START)
        optimizer = driver.hvd.DistributedOptimizer(SGD(0.1, momentum=0.9), model=model, sync=DiLoCo(2))
        fit(model, optimizer, own_batches(6), steps_per_execution=steps)
        assert optimizer.sync.metrics()["rounds"] == 3
        ends.append(weights_of(model))
    assert_close(ends[0], ends[1])


def test_a_step_left_out_on_one_rank_shifts_no_round(driver: ContractDriver, rank: int) -> None:
    """Loss scaling skips what is not finite there alone; the step counts, and the rank goes on voting."""
    model = network(START)
    inner = driver.hvd.DistributedOptimizer(SGD(0.1), model=model, sync=LocalSGD(4))
    batches = own_batches(4)
    if rank == 0:
        batches[1][0][0, 0] = np.inf
    fit(model, keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0), batches)
    metrics = inner.sync.metrics()
    assert metrics["steps"] == 4
    assert metrics["not_finite"] == 0
    assert all(np.isfinite(w).all() for w in weights_of(model))
    assert_equal_everywhere(model.weights)


def test_one_rank_may_ask_for_the_agreement_before_the_first_step_and_another_never_step(
    driver: ContractDriver, rank: int, size: int
) -> None:
    """Were a question a collective call, rank 0 would wait in it for ever."""
    model = network(START)
    optimizer = driver.hvd.DistributedOptimizer(SGD(0.1), model=model, sync=LocalSGD(2))
    if rank == 0:
        sync = optimizer.sync
        assert sync.trains
        assert sync.metrics()["rounds"] == sync.metrics()["bytes_sent"] == 0
        with sync.evaluating():
            assert_close([driver.numpy(w) for w in sync.outer_weights().values()], START, 1e-6)
        sync.tell(1.0, samples=3.0)
        named = set(sync.metrics())
        fit(model, optimizer, own_batches(3))
        assert sync is optimizer.sync
        assert set(sync.metrics()) == named
    optimizer.sync.flush()
    assert_equal_everywhere(model.weights)
    assert optimizer.sync.metrics()["rounds"] >= 2
    if size > 1:  # and now all, who flush without a step first
        optimizer = driver.hvd.DistributedOptimizer(SGD(0.1), model=model, sync=LocalSGD(2))
        optimizer.sync.flush()
        optimizer.apply(gradients(model, own_batches(1)[0]), model.trainable_variables)
        assert_differs_somewhere(model.weights)
        optimizer.sync.flush()
        assert_equal_everywhere(model.weights)


@pytest.mark.parametrize("warmup", [0, 3])
def test_a_pass_left_out_on_one_rank_counts_and_no_batch_waits_for_other_ranks(
    driver: ContractDriver, rank: int, size: int, warmup: int
) -> None:
    """Accumulating under loss scaling: other ranks have more batches, and one step of this one has no pass at all."""
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = network([0.1 * w for w in START])
    finally:
        keras.config.set_dtype_policy("float32")
    start = weights_of(model)
    inner = driver.hvd.DistributedOptimizer(
        SGD(0.1, momentum=0.9), model=model, backward_passes_per_step=2, sync=LocalSGD(100, warmup=warmup)
    )
    batches = [(np.float32(0.1) * x, np.float32(0.1) * y) for x, y in own_batches(6 + 4 * (rank > 0))]
    if rank == 0:
        for step in (1, 4, 5):  # the second pass of the first step, and the third step
            batches[step][0][0, 0] = np.inf
    fit(model, inner, batches)
    assert inner.sync.metrics()["steps"] == 3 + 2 * (rank > 0)
    made = 3 if warmup and size > 1 else 2  # in a warm-up the others' gradients count
    made = made if rank == 0 else len(batches) // 2
    assert int(inner.iterations) == made
    scaler = model.optimizer
    assert float(scaler.dynamic_scale) == scaler.initial_scale / (8 if rank == 0 else 1)
    if rank == 0 and warmup == 0:
        finite = [b for step, b in enumerate(batches) if step not in (1, 4, 5)]
        alone = network(start)
        plain = SGD(0.1, momentum=0.9)
        plain.build(alone.trainable_variables)
        for passes in (finite[:1], finite[1:]):
            each = [gradients(alone, batch) for batch in passes]
            plain.apply([sum(keras.ops.convert_to_tensor(g) for g in them) for them in zip(*each, strict=True)])
        assert_close(weights_of(model), weights_of(alone), 3e-3)
        moved = max(float(np.abs(a - b).max()) for a, b in zip(weights_of(alone), start, strict=True))
        assert moved > 1e-2  # far more than the tolerance
    inner.sync.flush()
    assert_equal_everywhere(model.weights)


MADE_ANEW: dict[str, Callable[[], Any]] = {
    "adam": lambda: Adam(0.01, amsgrad=True, gradient_accumulation_steps=2),
    "ema": lambda: SGD(0.1, use_ema=True),
    "schedule-free": lambda: keras.optimizers.ScheduleFreeAdamW(0.01),  # begins with the weights
}


@pytest.mark.parametrize("kind", MADE_ANEW)
def test_after_nan_an_optimizer_goes_on_as_one_just_made(
    driver: ContractDriver, rank: int, size: int, kind: str
) -> None:
    model = network(START)
    optimizer = driver.hvd.DistributedOptimizer(MADE_ANEW[kind](), model=model, sync=LocalSGD(4))
    passes = optimizer.gradient_accumulation_steps or 1
    batches = own_batches(7 * passes)
    ill = rank == size - 1 and size > 1
    if ill:
        batches[2 * passes][0][:] = np.nan
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, optimizer, batches[: 4 * passes])
        weights, updates = weights_of(model), int(optimizer.iterations)
        fit(model, optimizer, batches[4 * passes :])
    told = [str(w.message) for w in caught if "not finite" in str(w.message)]
    assert [text.startswith(f"Rank {rank} ") for text in told] == [True] * ill
    assert updates == 4, "schedules go by the updates of the whole run"
    if ill and kind == "ema":  # whose averages became the weights, twice
        for weight, shared in zip(weights, optimizer.sync.outer_weights().values(), strict=True):
            np.testing.assert_array_equal(weight, driver.numpy(shared))
    elif ill:
        assert_close(weights_of(model), plain_weights(MADE_ANEW[kind](), batches[4 * passes :], weights))
    assert optimizer.sync.metrics()["not_finite"] == (size > 1)
    assert optimizer.sync.state_dict()["anew"] == (4 if ill else 0)
    optimizer.sync.flush()
    assert all(np.isfinite(keras.ops.convert_to_numpy(v)).all() for v in optimizer.variables)
    assert_equal_everywhere(model.weights)


def test_bfloat16_parameters_have_a_float32_anchor(driver: ContractDriver) -> None:
    model = network(START, dtype="bfloat16")
    optimizer = driver.hvd.DistributedOptimizer(SGD(0.1), model=model, sync=DiLoCo(2))
    fit(model, optimizer, own_batches(6))
    anchors = [driver.numpy(w) for w in optimizer.sync.outer_weights().values()]
    for anchor, variable in zip(anchors, model.trainable_variables, strict=True):
        assert anchor.dtype == np.float32
        rounded = keras.ops.convert_to_numpy(keras.ops.cast(keras.ops.cast(anchor, "bfloat16"), "float32"))
        np.testing.assert_array_equal(rounded, keras.ops.convert_to_numpy(keras.ops.cast(variable, "float32")))
    assert any((anchor != anchor.astype(np.float16)).any() for anchor in anchors)


def words_and_head() -> tuple[Any, Any]:
    words = keras.layers.Embedding(6, 2, embeddings_initializer="ones")
    return keras.Sequential([keras.Input((1,), dtype="int32"), words, keras.layers.Flatten()]), words


@pytest.mark.parametrize("rows", ["all", "touched"])
def test_embedding_rows_that_one_rank_looked_up(driver: ContractDriver, rank: int, size: int, rows: Any) -> None:
    model, words = words_and_head()
    optimizer = driver.hvd.DistributedOptimizer(SGD(1.0), model=model, sync=LocalSGD(1, rows=rows))
    fit(model, optimizer, [(np.full((4, 1), rank, np.int32), np.zeros((4, 2), np.float32))])
    moved = 1 - driver.numpy(keras.ops.convert_to_tensor(words.embeddings))[:, 0]
    share = 1.0 if rows == "touched" else 1 / size  # the gradient of a row that was looked up is 1
    np.testing.assert_allclose(moved, [share] * size + [0.0] * (6 - size), rtol=1e-6)


def test_frozen_layers_stay_out_and_shared_ones_count_once(driver: ContractDriver) -> None:
    shared, frozen = keras.layers.Dense(3, use_bias=False), keras.layers.Dense(3)
    model = keras.Sequential([keras.Input((3,)), shared, frozen, shared, keras.layers.Dense(1)])
    frozen.trainable = False
    optimizer = driver.hvd.DistributedOptimizer(SGD(0.1), model=model, sync=LocalSGD(2))
    driver.hvd.broadcast_variables(model.variables, root_rank=0)
    before = [np.array(w) for w in frozen.get_weights()]
    fit(model, optimizer, own_batches(2))
    assert len(optimizer.sync.outer_weights()) == 3
    for old, new in zip(before, frozen.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert_equal_everywhere(model.weights)


def test_running_statistics_become_those_of_all_ranks_samples(driver: ContractDriver, rank: int, size: int) -> None:
    norm = keras.layers.BatchNormalization(momentum=0.0)  # the statistics of the last batch
    model = keras.Sequential([keras.Input((3,)), norm, keras.layers.Dense(1)])
    optimizer = driver.hvd.DistributedOptimizer(SGD(0.1), model=model, sync=LocalSGD(2))
    fit(model, optimizer, own_batches(2))
    everything = np.concatenate([x for x, _ in (oracle.batches(2, r)[1] for r in range(size))])
    assert_close(
        [np.asarray(norm.moving_mean), np.asarray(norm.moving_variance)], [everything.mean(0), everything.var(0)]
    )


@pytest.mark.parametrize("state", ["keep", "average", "reset"])
def test_moments_after_a_round(driver: ContractDriver, size: int, state: Any) -> None:
    model = network(START)
    optimizer = driver.hvd.DistributedOptimizer(SGD(0.1, momentum=0.9), model=model, sync=LocalSGD(2, state=state))
    fit(model, optimizer, own_batches(2))
    moments = optimizer.momentums
    if state == "keep":
        assert_differs_somewhere(moments)
        return
    assert_equal_everywhere(moments)
    assert any(np.asarray(keras.ops.convert_to_numpy(m)).any() for m in moments) == (state == "average")


def test_moments_that_keras_cannot_begin_anew_are_refused(driver: ContractDriver) -> None:
    model = network(START)
    with pytest.raises(driver.hvd.PlanError, match='state="reset" cannot begin Adam anew'):
        fit(
            model, driver.hvd.DistributedOptimizer(Adam(), model=model, sync=LocalSGD(2, state="reset")), own_batches(1)
        )


def test_several_optimizers_with_plans_of_their_own(driver: ContractDriver) -> None:
    plans = [LocalSGD(2), Gossip(3, peers="pairs"), None]
    models = [network(START) for _ in plans]
    optimizers = [
        driver.hvd.DistributedOptimizer(SGD(0.1), model=model, sync=plan)
        for model, plan in zip(models, plans, strict=True)
    ]
    for batch in own_batches(6):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.apply(gradients(model, batch), model.trainable_variables)
    for optimizer in optimizers:
        optimizer.sync.flush()
    for model in models:
        assert_equal_everywhere(model.weights)
    assert [o.sync.metrics().get("rounds") for o in optimizers] == [3, 3, None]


def test_a_saved_model_goes_on_in_the_middle_of_an_accumulated_step(driver: ContractDriver, tmp_path: Path) -> None:
    """And its running statistics, for which the optimizer must know the model, meet again."""

    def made() -> Any:
        keras.utils.set_random_seed(4)
        norm = keras.layers.BatchNormalization()
        return keras.Sequential([keras.Input((3,)), norm, keras.layers.Dense(2)])

    data = own_batches(8)
    whole = made()
    plan, optimizer = LocalSGD(2), SGD(0.1, gradient_accumulation_steps=2)
    optimizer = driver.hvd.DistributedOptimizer(optimizer, model=whole, sync=plan)
    fit(whole, optimizer, data[:3])
    saved = optimizer.sync.state_dict()
    whole.save(tmp_path / "model.keras")
    fit(whole, optimizer, data[3:])
    loaded = driver.hvd.load_model(tmp_path / "model.keras", sync=plan)
    loaded.optimizer.sync.load_state_dict(saved)
    fit(loaded, loaded.optimizer, data[3:])
    for ours, theirs in zip(loaded.weights, whole.weights, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    assert_equal_everywhere(loaded.weights)


def test_a_saved_model_is_as_large_as_without_rounds_and_loads_without(driver: ContractDriver, tmp_path: Path) -> None:
    sizes = []
    for plan in (None, DiLoCo(2, wire="int8")):
        model = network(START)
        fit(model, driver.hvd.DistributedOptimizer(SGD(0.1), model=model, sync=plan), own_batches(2))
        model.save(tmp_path / "model.keras")
        sizes.append((tmp_path / "model.keras").stat().st_size)
    assert abs(sizes[1] - sizes[0]) < 64  # names and times differ
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is type(SGD(0.1))
    assert_close(weights_of(loaded), weights_of(model), 0)
