"""The optimizer of a Keras model in stages, saved whole: one process, or another mesh, goes on from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

import hvdscale.keras as hvd
from tests.contract.keras_pipelines import MODELS, SEED, alone, array, fresh, tokens

Optimizers = keras.optimizers
MAKERS: dict[str, Callable[[], Any]] = {
    "AdamW": lambda: Optimizers.AdamW(2e-2, epsilon=1e-4, amsgrad=True, use_ema=True, global_clipnorm=0.5),
    "a schedule": lambda: Optimizers.SGD(Optimizers.schedules.CosineDecay(0.05, 50), momentum=0.9),
    "scaled": lambda: Optimizers.LossScaleOptimizer(Optimizers.Adam(1e-2), initial_scale=2.0),
}


def shard(mesh: hvd.Mesh, maker: str, weights: Any) -> tuple[Any, Any]:
    whole = fresh("tied")
    whole.set_weights(weights)
    sharded = hvd.shard_model(whole, mesh, loss=MODELS["tied"].loss, seed=SEED, microbatches=2)
    return sharded, hvd.DistributedOptimizer(MAKERS[maker](), model=sharded)


def step(sharded: Any, optimizer: Any) -> None:
    scale = 2.0 if hasattr(optimizer, "inner_optimizer") else 1.0
    _, gradients = sharded.train_step(*tokens(), loss_scale=scale)
    optimizer.apply(gradients, sharded.trainable_variables)


def kind(path: str) -> str:
    """momentum, velocity, ..."""
    return path.rpartition("/")[2].rpartition("_")[2]


@pytest.mark.parametrize("maker", MAKERS)
def test_training_goes_on_in_one_process_and_on_another_mesh(driver: Any, rank: int, size: int, maker: str) -> None:
    whole, plain = fresh("tied"), MAKERS[maker]()
    plain.build(whole.trainable_variables)
    sharded, optimizer = shard(hvd.Mesh(pp=size), maker, whole.get_weights())
    program = sharded._stages._units

    def plain_step(number: int) -> None:
        scale = 2.0 if maker == "scaled" else 1.0
        _, gradients = alone(MODELS["tied"], whole, *tokens(), 2, program, number)
        plain.apply([ops.convert_to_tensor(scale * g) for g in gradients], whole.trainable_variables)

    for number in range(3):
        step(sharded, optimizer)
        plain_step(number)
    state = sharded.optimizer_state_dict(optimizer)
    assert len(state) == len(plain.variables)
    for (path, value), variable in zip(state.items(), plain.variables, strict=True):
        assert kind(path) == kind(variable.path)
        np.testing.assert_allclose(value, array(variable), atol=1e-5, rtol=1e-4, err_msg=path)
    assert list(sharded.optimizer_state_dict(optimizer, root=size - 1)) == (list(state) if rank == size - 1 else [])

    weights = list(sharded.state_dict().values())
    whole.set_weights(weights)
    for variable, value in zip(plain.variables, state.values(), strict=True):
        variable.assign(value)
    others = [(sharded, optimizer)]
    for mesh in (hvd.Mesh(pp=size), hvd.Mesh(dp=size)):
        other, its_optimizer = shard(mesh, maker, weights)
        other.load_optimizer_state_dict(its_optimizer, {v.path: array(v) for v in plain.variables})
        again = other.optimizer_state_dict(its_optimizer)
        assert all((a == b).all() for a, b in zip(again.values(), state.values(), strict=True))
        others.append((other, its_optimizer))
    for model, its_optimizer in others:
        step(model, its_optimizer)
    plain_step(3)
    for model, its_optimizer in others:
        for value, variable in zip(model.state_dict().values(), whole.weights, strict=True):
            np.testing.assert_allclose(value, array(variable), atol=1e-5, rtol=1e-4, err_msg=variable.path)
        moments = model.optimizer_state_dict(its_optimizer).values()
        for value, variable in zip(moments, plain.variables, strict=True):
            np.testing.assert_allclose(value, array(variable), atol=1e-5, rtol=1e-4, err_msg=variable.path)


def test_state_that_does_not_fit_is_refused_on_every_rank(driver: Any, rank: int, size: int) -> None:
    sharded, optimizer = shard(hvd.Mesh(pp=size), "AdamW", fresh("tied").get_weights())
    state = sharded.optimizer_state_dict(optimizer)
    other = keras.optimizers.SGD(0.1, momentum=0.9)
    with pytest.raises(hvd.StateError, match="over the whole model has 11 variables; state of 38 came"):
        sharded.load_optimizer_state_dict(other, state)
    with pytest.raises(hvd.StateError, match="state of 1 came, and a has shape"):
        sharded.load_optimizer_state_dict(other, {"a": np.zeros((2, 2))})
    foreign = keras.optimizers.SGD(0.1)
    foreign.build([keras.Variable(1.0)] if rank == size - 1 else sharded.trainable_variables)
    with pytest.raises(hvd.StateError, match="which is not of the sharded model"):
        sharded.optimizer_state_dict(foreign)
    with pytest.raises(hvd.PlanError, match="rank 99"):
        sharded.optimizer_state_dict(optimizer, root=99)
