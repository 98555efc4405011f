"""What cannot be is said, on every rank alike, before anything is exchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

from hvdscale.errors import DesyncError, PlanError
from hvdscale.sync import EveryStep, LocalSGD
from tests.contract import oracle
from tests.contract.driver import ContractDriver
from tests.contract.keras_reference import BACKEND, fit, network, own_batches

START = oracle.initial_weights()
SGD = keras.optimizers.SGD


class _NoOptimizer:
    learning_rate = 0.1


def _twice(hvd: Any) -> Any:
    return hvd.DistributedOptimizer(hvd.DistributedOptimizer(SGD(0.1)))


def _twice_through_loss_scale(hvd: Any) -> Any:
    inner = hvd.DistributedOptimizer(SGD(0.1))
    return hvd.DistributedOptimizer(keras.optimizers.LossScaleOptimizer(inner))


WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "twice": (_twice, "distributed already"),
    "twice, loss scaled": (_twice_through_loss_scale, "distributed already"),
    "no optimizer": (lambda hvd: hvd.DistributedOptimizer(_NoOptimizer()), "takes a Keras 3 optimizer"),
    "a name": (lambda hvd: hvd.DistributedOptimizer("sgd"), "takes a Keras 3 optimizer"),
    "unknown sync": (lambda hvd: hvd.DistributedOptimizer(SGD(0.1), sync="daily"), "got 'daily'"),
    "unknown op": (lambda hvd: hvd.DistributedOptimizer(SGD(0.1), op="median"), "op must be"),
    "no passes": (lambda hvd: hvd.DistributedOptimizer(SGD(0.1), backward_passes_per_step=0), "> 0"),
    "predivided sum": (
        lambda hvd: hvd.DistributedOptimizer(SGD(0.1), op=hvd.Sum, gradient_predivide_factor=2.0),
        "gradient_predivide_factor",
    ),
    "no groups": (lambda hvd: hvd.DistributedOptimizer(SGD(0.1), groups=0), "groups must be"),
    "groups that are no number": (lambda hvd: hvd.DistributedOptimizer(SGD(0.1), groups=2.5), "got 2.5"),
    "groups in words": (lambda hvd: hvd.DistributedOptimizer(SGD(0.1), groups="two"), "got 'two'"),
    "groups of numbers": (lambda hvd: hvd.DistributedOptimizer(SGD(0.1), groups=[[1]]), "got a int in a list"),
    "negative groups": (lambda hvd: hvd.DistributedOptimizer(SGD(0.1), groups=-1), "groups"),
    "local layer not built": (
        lambda hvd: hvd.PartialDistributedOptimizer(SGD(0.1), local_layers=keras.layers.Dense(1)),
        "no variables yet",
    ),
    "local layer is none": (lambda hvd: hvd.PartialDistributedOptimizer(SGD(0.1), local_layers=[3]), "Keras layers"),
    "legacy optimizers": (lambda hvd: hvd.load_model("model.keras", legacy_opts=True), "legacy"),
    "all variables": (lambda hvd: hvd.broadcast_global_variables(0), "model=model"),
    "average and op": (lambda hvd: hvd.allreduce(1.0, average=True, op=hvd.Sum), "Give op only"),
    "fused": (lambda hvd: hvd.SyncBatchNormalization(fused=True), "fused"),
    "no file": (
        lambda hvd: hvd.callbacks.BestModelCheckpoint().on_train_begin(),
        "no file to write",
    ),
    "no learning rate": (lambda hvd: hvd.callbacks.LearningRateScheduleCallback(None, 1.0), "initial_lr"),
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_that_cannot_be(driver: ContractDriver, name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(PlanError, match=message):
        call(driver.hvd)


def _other_width(rank: int) -> Any:
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(5 + rank), keras.layers.Dense(1)])


def _other_dtype(rank: int) -> Any:
    dtype = "float32" if rank == 0 else "float16"
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, dtype=dtype), keras.layers.Dense(1)])


def _other_depth(rank: int) -> Any:
    return keras.Sequential(
        [keras.Input((3,)), *[keras.layers.Dense(3) for _ in range(rank + 1)], keras.layers.Dense(1)]
    )


DIFFERENT: dict[str, tuple[Callable[[int], Any], Callable[[Any, int], Any]]] = {
    "width": (_other_width, lambda hvd, rank: hvd.DistributedOptimizer(SGD(0.1))),
    "dtype": (_other_dtype, lambda hvd, rank: hvd.DistributedOptimizer(SGD(0.1))),
    "depth": (_other_depth, lambda hvd, rank: hvd.DistributedOptimizer(SGD(0.1))),
    "optimizer": (
        lambda rank: network(START),
        lambda hvd, rank: hvd.DistributedOptimizer(SGD(0.1) if rank == 0 else keras.optimizers.Adam(0.1)),
    ),
    "plan": (
        lambda rank: network(START),
        lambda hvd, rank: hvd.DistributedOptimizer(SGD(0.1), op=hvd.Sum if rank else hvd.Average),
    ),
    "name": (
        lambda rank: network(START),
        lambda hvd, rank: hvd.DistributedOptimizer(SGD(0.1), name="theirs" if rank else "mine"),
    ),
    "compression": (
        lambda rank: network(START),
        lambda hvd, rank: hvd.DistributedOptimizer(
            SGD(0.1), compression=hvd.Compression.fp16 if rank else hvd.Compression.none
        ),
    ),
}


@pytest.mark.parametrize("what", DIFFERENT)
@pytest.mark.parametrize("eager", [False, True])
def test_ranks_that_differ_all_hear_of_it(driver: ContractDriver, what: str, eager: bool) -> None:
    make_model, make_optimizer = DIFFERENT[what]
    rank = min(driver.hvd.rank(), 1)
    model, optimizer = make_model(rank), make_optimizer(driver.hvd, rank)
    if driver.hvd.size() == 1:
        fit(model, optimizer, own_batches(1), run_eagerly=eager)
        return
    with pytest.raises(DesyncError, match="rank 0") as caught:
        fit(model, optimizer, own_batches(1), run_eagerly=eager)
    everyone = driver.hvd.world().transport.allgather(str(caught.value).encode())
    assert len(set(everyone)) == 1


@pytest.mark.parametrize("where", ["argument", "callback"])
def test_a_model_that_only_one_rank_has_built_is_told(driver: ContractDriver, where: str) -> None:
    hvd = driver.hvd
    model = keras.Sequential([keras.layers.Dense(5), keras.layers.Dense(1)])
    if hvd.rank() == 0:
        model.build((None, 3))

    def start() -> None:
        if where == "argument":
            hvd.DistributedOptimizer(SGD(0.1), model=model)
            return
        callback = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
        model.compile(SGD(0.1), "mse")
        callback.set_model(model)
        callback.on_train_begin()

    if hvd.size() == 1:
        start()
        return
    with pytest.raises(DesyncError, match="the model has weights = False") as caught:
        start()
    assert "rank 0: the model has weights = True" in str(caught.value)


def test_another_model_built_on_one_rank_is_no_difference(driver: ContractDriver) -> None:
    if driver.hvd.rank() == 0:
        network(START)  # moves Keras's automatic layer names
    model = network(START)
    fit(model, driver.hvd.DistributedOptimizer(SGD(0.1)), own_batches(1))
    assert np.isfinite(np.concatenate([np.ravel(w) for w in model.get_weights()])).all()


def test_a_variable_that_comes_late_is_refused(driver: ContractDriver) -> None:
    model = network(START)
    optimizer = driver.hvd.DistributedOptimizer(SGD(0.1))
    grads = [keras.ops.ones(v.shape) for v in model.trainable_variables]
    optimizer.apply([None, *grads[1:]], model.trainable_variables)
    if driver.hvd.size() == 1:
        optimizer.apply(grads, model.trainable_variables)
        return
    with pytest.raises(PlanError, match="has a gradient now"):
        optimizer.apply(grads, model.trainable_variables)


if BACKEND == "tensorflow":

    @pytest.mark.parametrize("sync", [None, LocalSGD(2), EveryStep(wire="int8")], ids=lambda sync: type(sync).__name__)
    def test_xla_is_refused(driver: ContractDriver, sync: Any) -> None:
        model = network(START)
        optimizer = driver.hvd.DistributedOptimizer(SGD(0.1), model=model, sync=sync)
        if driver.hvd.size() == 1 and not isinstance(sync, LocalSGD):
            fit(model, optimizer, own_batches(1), jit_compile=True)
            return
        with pytest.raises(PlanError, match="jit_compile=False"):
            fit(model, optimizer, own_batches(1), jit_compile=True)

    def test_auto_leaves_xla_off_where_keras_would_choose_it(
        driver: ContractDriver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import tensorflow as tf

        plain = network(START)
        ours = network(START)
        device = type("Device", (), {"device_type": "GPU"})()
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: [device])
        plain.compile(SGD(0.1), "mse")
        ours.compile(driver.hvd.DistributedOptimizer(SGD(0.1)), "mse")
        assert plain.jit_compile
        assert not ours.jit_compile
