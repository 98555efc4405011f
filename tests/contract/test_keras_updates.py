"""Placed updates among the things a Keras script does: clipping, accumulation, averages, loss scaling, saved models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from hvdscale.sync import EveryStep
from tests.contract import oracle
from tests.contract.driver import ContractDriver, crossed
from tests.contract.keras_reference import assert_close, assert_equal_everywhere, fit, network, own_batches, weights_of

PLACED = ("central", "sharded")
START = oracle.initial_weights()
Make = Callable[[], Any]


def _excluding() -> Any:
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.2, epsilon=1e-3)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


CASES: dict[str, tuple[Make, dict[str, Any]]] = {
    "clipnorm": (lambda: keras.optimizers.SGD(0.1, clipnorm=0.1), {}),
    "clipvalue": (lambda: keras.optimizers.SGD(0.1, clipvalue=0.05), {}),
    "global_clipnorm": (lambda: keras.optimizers.Adam(0.01, epsilon=1e-3, amsgrad=True, global_clipnorm=0.1), {}),
    "no decay of biases": (_excluding, {}),
    "averages": (lambda: keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=3), {}),
    "accumulation": (
        lambda: keras.optimizers.Adam(0.01, epsilon=1e-3, gradient_accumulation_steps=2, global_clipnorm=0.1),
        {},
    ),
    "passes": (lambda: keras.optimizers.SGD(0.1, momentum=0.9), {"backward_passes_per_step": 2}),
    "schedule": (lambda: keras.optimizers.Nadam(keras.optimizers.schedules.ExponentialDecay(0.02, 2, 0.5)), {}),
    "loss scale": (lambda: keras.optimizers.SGD(0.1, global_clipnorm=0.1), {"scaled": True}),
    "Lion": (lambda: keras.optimizers.Lion(0.01), {}),
}


def _end(driver: ContractDriver, make: Make, update: str, scaled: bool = False, **arguments: Any) -> Any:
    model = network(START)
    optimizer = driver.hvd.DistributedOptimizer(make(), model=model, sync=EveryStep(update), **arguments)
    if scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=4.0)
    fit(model, optimizer, own_batches(6), run_eagerly=False)
    return model


@pytest.mark.parametrize("case", CASES)
def test_training_ends_where_local_updates_do(driver: ContractDriver, rank: int, case: str) -> None:
    make, arguments = CASES[case]
    local = _end(driver, make, "local", **arguments)
    for update in PLACED:
        model = _end(driver, make, update, **arguments)
        assert_close(weights_of(model), weights_of(local), 1e-6)
        assert_equal_everywhere(model.variables)
        assert int(model.optimizer.iterations) == int(local.optimizer.iterations)


@pytest.mark.parametrize(("goes_on", "update"), crossed(["local", *PLACED], ["sharded", "central"]))
def test_a_saved_model_holds_the_whole_state(
    driver: ContractDriver, rank: int, size: int, tmp_path: Path, update: str, goes_on: str
) -> None:
    def make() -> Any:
        return keras.optimizers.Adam(0.01, epsilon=1e-3)

    batches = own_batches(6)
    wanted = network(START)
    fit(wanted, driver.hvd.DistributedOptimizer(make()), batches)
    model = network(START)
    fit(model, driver.hvd.DistributedOptimizer(make(), model=model, sync=EveryStep(update)), batches[:3])
    path = tmp_path / "model.keras"
    model.save(path)  # on every rank, in its own folder: collective
    plain = keras.models.load_model(path)
    assert isinstance(plain.optimizer, keras.optimizers.Adam)
    assert not hasattr(plain.optimizer, "_hvdscale")
    assert [tuple(v.shape) for v in plain.optimizer.variables] == [tuple(v.shape) for v in wanted.optimizer.variables]
    loaded = driver.hvd.load_model(path, sync=EveryStep(goes_on))
    fit(loaded, loaded.optimizer, batches[3:])
    assert_close(weights_of(loaded), weights_of(wanted), 1e-6)
    fit(model, model.optimizer, batches[3:])
    assert_close(weights_of(model), weights_of(wanted), 1e-6)


@pytest.mark.parametrize("update", PLACED)
def test_saved_by_all_ranks_and_loaded_by_one_process_and_back(
    driver: ContractDriver, rank: int, tmp_path: Path, update: str
) -> None:
    """All ranks compute alike, so that the number of ranks changes no gradient."""

    def make() -> Any:
        return keras.optimizers.Nadam(0.01, epsilon=1e-3)  # whose state has a number for all variables together

    batches = [(x.astype("float32"), y.astype("float32")) for x, y in oracle.batches(6, 0)]
    wanted, several, one = (network(START) for _ in range(3))
    fit(wanted, make(), batches)
    fit(several, driver.hvd.DistributedOptimizer(make(), model=several, sync=EveryStep(update)), batches[:3])
    several.save(tmp_path / "several.keras")
    fit(one, make(), batches[:3])
    one.save(tmp_path / "one.keras")
    one = keras.models.load_model(tmp_path / "several.keras")  # knows nothing of ranks
    several = driver.hvd.load_model(tmp_path / "one.keras", sync=EveryStep(update))
    for model in (one, several):
        fit(model, model.optimizer, batches[3:])
        assert_close(weights_of(model), weights_of(wanted), 1e-6)


@pytest.mark.parametrize("update", PLACED)
def test_after_a_flush_the_first_rank_saves_alone(
    driver: ContractDriver, rank: int, size: int, tmp_path: Path, update: str
) -> None:
    model = network(START)
    optimizer = driver.hvd.DistributedOptimizer(keras.optimizers.Adam(0.01), model=model, sync=EveryStep(update))
    fit(model, optimizer, own_batches(2))
    optimizer.sync.flush()
    if rank == 0:
        model.save(tmp_path / "model.keras")
        assert int(keras.models.load_model(tmp_path / "model.keras").optimizer.iterations) == 2
    else:
        with pytest.raises(driver.hvd.StateError, match="first rank holds the whole"):
            model.save(tmp_path / "model.keras")
    fit(model, optimizer, own_batches(1))
    assert_equal_everywhere(model.variables)


@pytest.mark.parametrize("update", PLACED)
def test_a_rank_keeps_its_part_of_the_state(driver: ContractDriver, rank: int, size: int, update: str) -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(501), keras.layers.Dense(1)])
    optimizer = driver.hvd.DistributedOptimizer(keras.optimizers.Adam(), model=model, sync=EveryStep(update))
    fit(model, optimizer, own_batches(1))
    whole = 2 * 4 * sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    held = sum(4 * int(np.prod(v.shape)) for v in optimizer.variables if len(v.shape))
    if update == "sharded":
        assert held <= 1.05 * whole / size
    else:
        assert held == (whole if rank == 0 else 0)
    if size > 1:
        assert optimizer.sync.metrics()["state_bytes"] == held


def test_embeddings(driver: ContractDriver, rank: int) -> None:
    """Gradients that TensorFlow makes sparse."""
    ends = []
    for update in ("local", *PLACED):
        words = keras.layers.Embedding(9, 3, embeddings_initializer="ones")
        model = keras.Sequential([keras.Input((2,), dtype="int32"), words, keras.layers.Flatten()])
        model.compile(
            driver.hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), model=model, sync=EveryStep(update)), "mse"
        )
        model.fit(np.array([[rank, 1]]), np.zeros((1, 6), "float32"), epochs=3, verbose=0)
        ends.append(weights_of(model))
    assert_close(ends[1], ends[0], 1e-6)
    assert_close(ends[2], ends[0], 1e-6)


def test_half_precision(driver: ContractDriver, rank: int, size: int, tmp_path: Path) -> None:
    """Variables in bfloat16 follow float32 training step by step; those of mixed_bfloat16 are float32 anyway."""

    def make(policy: str, update: str) -> tuple[Any, Any]:
        layer = keras.layers.Dense(3, use_bias=False, kernel_initializer="ones", dtype=policy)
        model = keras.Sequential([keras.Input((3,)), layer])
        inner = keras.optimizers.SGD(2e-4, momentum=0.5)
        optimizer = driver.hvd.DistributedOptimizer(inner, model=model, sync=EveryStep(update))
        model.compile(optimizer, "mae")  # its gradient does not depend on the weights
        return model, optimizer

    def kernel(model: Any) -> np.ndarray:
        return np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(model.variables[0], "float32")))

    x, y = np.full((1, 3), rank + 1, "float32"), np.full((1, 3), -100, "float32")
    mixed = []
    for update in ("local", *PLACED):
        model, _ = make("mixed_bfloat16", update)
        model.fit(x, y, epochs=20, verbose=0)
        mixed.append(kernel(model))
        np.testing.assert_allclose(mixed[-1], mixed[0], atol=1e-6)
    for update in PLACED if size > 1 else ():  # alone, the optimizer is the user's own
        model, optimizer = make("bfloat16", update)
        model.fit(x, y, epochs=20, verbose=0)
        assert keras.backend.standardize_dtype(model.variables[0].dtype) == "bfloat16"
        np.testing.assert_allclose(kernel(model), mixed[0], rtol=2**-8)  # one rounding, not one a step
        assert (kernel(model) < 1).all(), "bfloat16 alone would have stood still"
        held = [v for v in optimizer.variables if len(v.shape)]
        assert all(keras.backend.standardize_dtype(v.dtype) == "float32" for v in held)
        elements = np.array([2 * 4 * sum(int(np.prod(v.shape)) for v in held)], np.float32)  # momentum and master
        assert optimizer.sync.metrics()["state_bytes"] == elements[0]
        assert driver.everyones(elements).sum() == 2 * 4 * 9
        model.save(tmp_path / f"{update}.keras")  # as a plain optimizer keeps it: in bfloat16, without masters
        loaded = driver.hvd.load_model(tmp_path / f"{update}.keras", sync=EveryStep(update))
        np.testing.assert_array_equal(kernel(loaded), kernel(model))
        loaded.fit(x, y, epochs=20, verbose=0)
        assert (kernel(loaded) < kernel(model)).all()


@pytest.mark.parametrize("update", PLACED)
def test_the_broadcast_callback_leaves_parts_where_they_are(driver: ContractDriver, rank: int, update: str) -> None:
    model = network()
    optimizer = driver.hvd.DistributedOptimizer(keras.optimizers.Adam(0.01), sync=EveryStep(update))
    model.compile(optimizer, "mse")
    x, y = own_batches(1)[0]
    model.fit(x, y, verbose=0, callbacks=[driver.hvd.callbacks.BroadcastGlobalVariablesCallback(0)])
    driver.hvd.broadcast_global_variables(0, model=model)
    assert_equal_everywhere(model.variables)


def test_a_constraint_holds_for_whole_variables(driver: ContractDriver, rank: int) -> None:
    ends = []
    for update in ("local", *PLACED):
        layer = keras.layers.Dense(2, use_bias=False, kernel_constraint="unit_norm", kernel_initializer="ones")
        model = keras.Sequential([keras.Input((oracle.INPUTS,)), layer])
        optimizer = driver.hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), model=model, sync=EveryStep(update))
        model.compile(optimizer, "mse")
        x, _ = own_batches(1)[0]
        model.fit(x, np.zeros((len(x), 2), "float32"), verbose=0)
        ends.append(weights_of(model))
    assert_close(ends[1], ends[0], 1e-6)
    assert_close(ends[2], ends[0], 1e-6)


class ByNorm(keras.optimizers.SGD):
    """Not element-wise, and of no name anyone knows."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        super().update_step(gradient / keras.ops.norm(gradient), variable, learning_rate)


@pytest.mark.parametrize("make", [keras.optimizers.Adafactor, keras.optimizers.Lamb, ByNorm])
def test_a_central_update_takes_what_looks_at_whole_tensors(driver: ContractDriver, rank: int, make: Make) -> None:
    local, central = (_end(driver, lambda: make(0.01), update) for update in ("local", "central"))
    assert_close(weights_of(central), weights_of(local), 1e-6)
    assert_equal_everywhere(central.variables)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("update", PLACED)
def test_ranks_on_which_nothing_is_updated_stand_still(driver: ContractDriver, rank: int, update: str) -> None:
    """The large variable, which with "sharded" is all that the first ranks hold, has no gradient."""
    ends = []
    for kind in ("local", update):
        variables = [keras.Variable(np.full(60, 2.0, "float32")), keras.Variable(np.ones(3, "float32"))]
        inner = keras.optimizers.Nadam(0.01, epsilon=1e-3, clipnorm=0.1, use_ema=True, ema_momentum=0.5)
        optimizer = driver.hvd.DistributedOptimizer(inner, sync=EveryStep(kind))
        for step in range(3):
            optimizer.apply([None, keras.ops.convert_to_tensor(np.float32([1, step, rank]))], variables)
        state: dict[str, Any] = {}
        optimizer.save_own_variables(state)  # of a list of variables in their order
        optimizer.finalize_variable_values(variables)
        ends.append([*state.values(), *variables])
    for placed, local in zip(ends[1], ends[0], strict=True):
        np.testing.assert_allclose(keras.ops.convert_to_numpy(placed), keras.ops.convert_to_numpy(local), atol=1e-6)
    assert (keras.ops.convert_to_numpy(variables[0]) == 2).all()


def test_optimizers_that_cannot_be_placed_are_named(driver: ContractDriver, rank: int, size: int) -> None:
    hvd = driver.hvd
    optimizers = keras.optimizers
    for make in (optimizers.Adafactor, optimizers.Lamb, lambda: optimizers.Muon(exclude_embeddings=False), ByNorm):
        optimizer = make()
        with pytest.raises(hvd.PlanError, match=type(optimizer).__name__):
            hvd.DistributedOptimizer(optimizer, sync=EveryStep("sharded"))
    with pytest.raises(hvd.PlanError, match="LossScaleOptimizer"):
        hvd.DistributedOptimizer(optimizers.LossScaleOptimizer(optimizers.SGD()), sync=EveryStep("central"))
    for update in PLACED if size > 1 else ():
        optimizer = hvd.DistributedOptimizer(optimizers.SGD(), sync=EveryStep(update))
        model = network(START)
        optimizer.register_local_var(model.trainable_variables[0])
        with pytest.raises(hvd.PlanError, match="register_local_var"):
            optimizer.build(model.trainable_variables)
