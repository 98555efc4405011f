"""N ranks with batch B train as one process with batch N*B does, in every way Keras can train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

from hvdscale.sync import EveryStep, LocalSGD
from tests.contract import oracle
from tests.contract.driver import ContractDriver
from tests.contract.keras_reference import (
    BACKEND,
    all_batches,
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

OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: SGD(0.1),
    "nesterov": lambda: SGD(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: Adam(0.01),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01),
    "lion": lambda: keras.optimizers.Lion(0.01),
    "schedule-free": lambda: keras.optimizers.ScheduleFreeAdamW(0.01),
    "global clip": lambda: SGD(0.1, global_clipnorm=0.5),
    "clip each": lambda: SGD(0.1, clipnorm=0.3),
    "clip value": lambda: SGD(0.1, clipvalue=0.1),
    "moving average": lambda: SGD(0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2),
    "schedule": lambda: SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)),
    "accumulation": lambda: Adam(0.01, gradient_accumulation_steps=2, global_clipnorm=0.3),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(SGD(0.1), initial_scale=8.0),
}

WAYS: dict[str, dict[str, Any]] = {"graph": {}, "eager": {"run_eagerly": True}, "jit auto": {"jit_compile": "auto"}}
if BACKEND == "tensorflow":
    WAYS["several steps per execution"] = {"steps_per_execution": 2}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_fit_equals_plain_keras_on_all_batches(driver: ContractDriver, kind: str) -> None:
    model = network(START)
    optimizer = driver.hvd.DistributedOptimizer(OPTIMIZERS[kind](), model=model)
    fit(model, optimizer, own_batches(4))
    # Lion takes the sign of the gradient: rounding may flip one that is nearly zero.
    assert_close(weights_of(model), plain_weights(OPTIMIZERS[kind](), all_batches(4), START), 1e-4)
    assert_equal_everywhere([*model.weights, *optimizer.variables])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["adam", "accumulation"])
def test_every_way_of_compiling(driver: ContractDriver, kind: str, way: str) -> None:
    model = network(START)
    fit(model, driver.hvd.DistributedOptimizer(OPTIMIZERS[kind]()), own_batches(4), **WAYS[way])
    assert_close(weights_of(model), plain_weights(OPTIMIZERS[kind](), all_batches(4), START), 1e-4)


def _apply(model: Any, optimizer: Any, batch: Any) -> None:
    optimizer.apply(gradients(model, batch), model.trainable_variables)


def _apply_to_known(model: Any, optimizer: Any, batch: Any) -> None:
    if not optimizer.built:
        optimizer.build(model.trainable_variables)
    optimizer.apply(gradients(model, batch))


def _apply_gradients(model: Any, optimizer: Any, batch: Any) -> None:
    optimizer.apply_gradients(zip(gradients(model, batch), model.trainable_variables, strict=True))


LOOPS: dict[str, Callable[[], Any]] = {
    "apply": lambda: _apply,
    "apply without variables": lambda: _apply_to_known,
    "apply_gradients": lambda: _apply_gradients,
}
if BACKEND == "tensorflow":
    import tensorflow as tf

    LOOPS["tf.function"] = lambda: tf.function(_apply_gradients)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("passes", [1, 2])
def test_loops_of_your_own(driver: ContractDriver, loop: str, passes: int) -> None:
    model = network(START)
    optimizer = driver.hvd.DistributedOptimizer(
        SGD(0.1, momentum=0.9), backward_passes_per_step=passes, average_aggregated_gradients=True
    )
    step = LOOPS[loop]()
    for batch in own_batches(4):
        step(model, optimizer, batch)
    # Equal batches: the mean over passes is the gradient of the joined batch.
    steps = all_batches(4)
    joined = [
        tuple(np.concatenate(parts) for parts in zip(*steps[i : i + passes], strict=True)) for i in range(0, 4, passes)
    ]
    assert_close(weights_of(model), plain_weights(SGD(0.1, momentum=0.9), joined, START))


@pytest.mark.parametrize(
    ("kind", "average", "way"),
    [
        ("sgd", False, "graph"),
        ("adam", False, "graph"),
        ("adam", True, "graph"),
        ("momentum", True, "eager"),
        ("adam", False, "eager"),
    ],
)
def test_backward_passes_add_up(driver: ContractDriver, kind: str, average: bool, way: str) -> None:
    passes, steps = 2, 6
    model = network(START)
    optimizer = driver.hvd.DistributedOptimizer(
        driver.optimizer(kind, model), backward_passes_per_step=passes, average_aggregated_gradients=average
    )
    fit(model, optimizer, own_batches(steps), **WAYS[way])
    update, weights = oracle.OPTIMIZERS[kind](), START
    every = [oracle.batches(steps, rank) for rank in range(driver.hvd.size())]
    for first in range(0, steps, passes):
        parts = [oracle.mean_gradients(weights, [b[first + i] for b in every]) for i in range(passes)]
        total = [np.sum(g, axis=0) / (passes if average else 1) for g in zip(*parts, strict=True)]
        weights = update(weights, total)
    assert_close(weights_of(model), weights, 1e-4)
    assert int(optimizer.iterations) == steps // passes  # updates, not batches


ARGUMENTS: dict[str, Callable[[Any, Any], dict[str, Any]]] = {
    "two groups": lambda hvd, model: {"groups": 2},
    "num_groups": lambda hvd, model: {"num_groups": 2},
    "groups of variables": lambda hvd, model: {"groups": [[layer.kernel for layer in model.layers]]},
    "predivided": lambda hvd, model: {"gradient_predivide_factor": 2.0},
    "half precision": lambda hvd, model: {"compression": hvd.Compression.fp16},
    "sparse as dense": lambda hvd, model: {"sparse_as_dense": True},
    "named": lambda hvd, model: {"name": "mine"},
}


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.filterwarnings("ignore:num_groups")
def test_arguments_of_the_reduction(driver: ContractDriver, name: str) -> None:
    model = network(START)
    arguments = ARGUMENTS[name](driver.hvd, model)
    fit(model, driver.hvd.DistributedOptimizer(Adam(0.01), **arguments), own_batches(3))
    tolerance = 2e-2 if name == "half precision" else 2e-5
    assert_close(weights_of(model), plain_weights(Adam(0.01), all_batches(3), START), tolerance)


TRACED: dict[str, dict[str, Any]] = {
    "every step": {},
    "passes": {"backward_passes_per_step": 2},
    "rounds": {"sync": LocalSGD(2)},
    "sharded": {"sync": EveryStep("sharded")},
}


@pytest.mark.parametrize("name", TRACED)
def test_a_step_is_traced_once(driver: ContractDriver, name: str) -> None:
    """TensorFlow traces again what made variables. An optimizer's are made beside the graph, not in it."""
    model, calls = network(START), []
    plain = model.train_step

    def train_step(data: Any) -> Any:
        calls.append(name)
        return plain(data)

    model.train_step = train_step
    fit(model, driver.hvd.DistributedOptimizer(Adam(0.01), model=model, **TRACED[name]), own_batches(4))
    assert len(calls) == (1 if BACKEND == "tensorflow" else 4)


def test_sum_instead_of_average(driver: ContractDriver) -> None:
    model = network(START)
    fit(model, driver.hvd.DistributedOptimizer(SGD(0.1), op=driver.hvd.Sum), own_batches(3))
    expected = plain_weights(SGD(0.1 * driver.hvd.size()), all_batches(3), START)
    assert_close(weights_of(model), expected)


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("way", ["graph", "eager"])
def test_model_argument_shares_the_first_ranks_weights(driver: ContractDriver, built: bool, way: str) -> None:
    keras.utils.set_random_seed(driver.hvd.rank())  # first: a dropout layer draws its seed where it is made
    layers = [keras.layers.Dense(5, activation="tanh"), keras.layers.Dropout(0.5), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((3,)), *layers] if built else layers)
    optimizer = driver.hvd.DistributedOptimizer(Adam(0.01), model=model)
    fit(model, optimizer, own_batches(3), **WAYS[way])
    assert_equal_everywhere([*model.weights, *optimizer.variables])
    seeds = [v for v in model.variables if v.name == "seed_generator_state"]
    assert len(seeds) == 1
    assert_differs_somewhere(seeds)


@pytest.mark.parametrize("by", ["argument", "callback"])
@pytest.mark.parametrize("way", ["graph", "eager", "loop"])
def test_a_model_that_its_first_batch_builds_starts_from_the_first_ranks_weights(
    driver: ContractDriver, way: str, by: str
) -> None:
    """Also the very first gradient is one at those weights."""
    hvd = driver.hvd

    def made(seed: int) -> Any:
        keras.utils.set_random_seed(seed)
        return keras.Sequential([keras.layers.Dense(5, activation="tanh"), keras.layers.Dense(1)])

    first = made(0)
    first.build((None, 3))
    start, model, batches = weights_of(first), made(hvd.rank()), own_batches(3)
    callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0)]
    optimizer = hvd.DistributedOptimizer(SGD(0.1), model=model if by == "argument" else None)
    model.compile(optimizer, "mse", run_eagerly=way == "eager")
    if way != "loop":
        x, y = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=callbacks if by == "callback" else [])
    else:
        if by == "callback":
            callbacks[0].set_model(model)
            callbacks[0].on_train_begin()
        for batch in batches:
            _apply(model, optimizer, batch)
    assert_close(weights_of(model), plain_weights(SGD(0.1), all_batches(3), start))
    assert_equal_everywhere(model.weights)
    assert "_maybe_build" not in vars(model)  # what waited for the model is gone


def test_state_from_before_is_kept_and_shared(driver: ContractDriver) -> None:
    batches = own_batches(2)
    model = network(START)
    optimizer = Adam(0.01)
    fit(model, optimizer, batches)  # every rank its own way
    assert_differs_somewhere(optimizer.variables)
    assert driver.hvd.DistributedOptimizer(optimizer, model=model) is optimizer
    fit(model, optimizer, own_batches(3))  # compiled anew by nobody
    assert int(optimizer.iterations) == 5
    assert model.optimizer is optimizer


def test_learning_rate_can_be_set_between_steps(driver: ContractDriver) -> None:
    model = network(START)
    optimizer = driver.hvd.DistributedOptimizer(SGD(0.1))
    fit(model, optimizer, own_batches(1))
    optimizer.learning_rate = 0.0
    before = weights_of(model)
    fit(model, optimizer, own_batches(1))
    assert float(optimizer.learning_rate) == 0.0
    assert_close(weights_of(model), before, 0.0)


@pytest.mark.parametrize("scale", [True, False])
def test_local_layers_keep_their_own_gradients(driver: ContractDriver, scale: bool) -> None:
    hvd = driver.hvd
    model = network(START)
    optimizer = hvd.PartialDistributedOptimizer(SGD(0.1), local_layers=model.layers[1], scale_local_gradients=scale)
    fit(model, optimizer, own_batches(1))
    own = oracle.gradients(START, oracle.batches(1, hvd.rank())[0])
    mean = oracle.mean_gradients(START, [oracle.batches(1, r)[0] for r in range(hvd.size())])
    share = hvd.size() if scale else 1
    reduced = [*mean[:2], own[2] / share, own[3] / share]
    assert_close(weights_of(model), oracle.sgd()(START, reduced))


@pytest.mark.parametrize("as_dense", [True, False])
@pytest.mark.parametrize("passes", [1, 2])
def test_embeddings_with_sparse_gradients(driver: ContractDriver, as_dense: bool, passes: int) -> None:
    hvd = driver.hvd

    def model() -> Any:
        made = keras.Sequential(
            [keras.Input((2,), dtype="int32"), keras.layers.Embedding(6, 3), keras.layers.Flatten()]
        )
        made.add(keras.layers.Dense(1))
        rng = np.random.default_rng(5)
        made.set_weights([rng.normal(size=w.shape).astype(np.float32) for w in made.get_weights()])
        return made

    def batches(rank: int) -> list[Any]:
        rng = np.random.default_rng([9, rank])
        return [(rng.integers(0, 6, (4, 2)), rng.normal(size=(4, 1)).astype(np.float32)) for _ in range(2)]

    ours = model()
    optimizer = hvd.DistributedOptimizer(
        SGD(0.1), sparse_as_dense=as_dense, backward_passes_per_step=passes, average_aggregated_gradients=True
    )
    fit(ours, optimizer, batches(hvd.rank()))
    steps = [
        tuple(np.concatenate(p) for p in zip(*same, strict=True))
        for same in zip(*[batches(r) for r in range(hvd.size())], strict=True)
    ]
    if passes == 2:
        steps = [tuple(np.concatenate(p) for p in zip(*steps, strict=True))]
    theirs = model()
    fit(theirs, SGD(0.1), steps)
    assert_close(weights_of(ours), weights_of(theirs))


def test_two_optimizers_at_once(driver: ContractDriver) -> None:
    models = [network(START), network(START)]
    optimizers = [driver.hvd.DistributedOptimizer(SGD(rate)) for rate in (0.1, 0.2)]
    for batch in own_batches(2):
        for model, optimizer in zip(models, optimizers, strict=True):
            _apply(model, optimizer, batch)
    for model, rate in zip(models, (0.1, 0.2), strict=True):
        assert_close(weights_of(model), plain_weights(SGD(rate), all_batches(2), START))
