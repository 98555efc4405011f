"""Stages of a Keras model whose layers are split over tensor ranks train as the model does in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import hvdscale.keras as hvd
from tests.contract.keras_pipelines import SEED, Model, TiedHead, alone, array
from tests.contract.test_keras_features import CONTEXT, VOCABULARY, WIDTH, batch, functional, loss_of, whole_gradients


def cut_inside() -> keras.Model:
    """An MLP taken apart: what a column gives, a part, goes to the dropout and the row on the next stage."""
    middle = [layers.Dense(22, activation="gelu"), layers.Dropout(0.3, seed=1), layers.Dense(WIDTH)]
    return keras.Sequential(
        [keras.Input((CONTEXT,), dtype="int32"), layers.Embedding(VOCABULARY, WIDTH), *middle,
         layers.BatchNormalization(), layers.Dense(VOCABULARY)]
    )  # fmt: skip


def tied() -> keras.Model:
    """The table is whole on the first and the last stage; the layers between are split."""
    tokens = keras.Input((CONTEXT,), dtype="int32")
    table = layers.Embedding(VOCABULARY, WIDTH)
    x = table(tokens)
    for _ in range(2):
        x = layers.Add()([x, layers.Dense(WIDTH)(layers.Dense(13, activation="tanh")(x))])
    return keras.Model(tokens, TiedHead(table)(x))


MODELS: dict[str, Callable[[], keras.Model]] = {
    "dropout": lambda: functional(0.2),
    "own": lambda: functional(own=True),
    "tied": tied,
    "cut inside": cut_inside,
}
WAYS: dict[str, dict[str, Any]] = {
    "dropout": {"schedule": "1f1b"},
    "own": {"schedule": "gpipe", "recompute": True},
    "tied": {"schedule": "zb"},
    "cut inside": {"schedule": "1f1b", "recompute": True},
}


def fresh(name: str, seed: int = 5) -> keras.Model:
    model = MODELS[name]()
    draw = np.random.default_rng(seed)
    model.set_weights([draw.uniform(0.1, 0.4, w.shape).astype("float32") for w in model.get_weights()])
    return model


def mesh_of(size: int) -> hvd.Mesh:
    return hvd.Mesh(pp=2, tp=2) if size == 4 else hvd.Mesh(tp=size)


def shard(whole: Any, mesh: hvd.Mesh, **more: Any) -> Any:
    return hvd.shard_model(whole, mesh, **{"loss": loss_of, "seed": SEED, "microbatches": 2, **more})


def expected(
    whole: keras.Model, sharded: Any, step: int, copy: int = 0, seed: int | None = None
) -> tuple[float, list[Any]]:
    """Of one process: loss and gradients of the batch of this seed (that of the step)."""
    x, y = batch(step if seed is None else seed, 5)
    model = Model(lambda: whole, lambda: (x, y), loss_of)
    return alone(model, whole, x, y, 2, sharded._stages._units, step, copy)


@pytest.mark.parametrize("name", MODELS)
def test_loss_gradients_and_training_are_those_of_one_process(driver: Any, size: int, rank: int, name: str) -> None:
    mesh = mesh_of(size)
    for _ in range(rank):
        layers.Dense(1)  # Keras counts layers; a rank may have made more of them
    # Weights are those of a stage's first rank.
    given = fresh(name, 5 if mesh.coordinates(rank).tp == 0 else 6)
    sharded, whole = shard(given, mesh, **WAYS[name]), fresh(name)
    same(sharded.state_dict(), whole, 0)
    every, held = sharded.count()
    assert every == sum(int(np.prod(v.shape)) for v in whole.trainable_variables)
    assert held < every or mesh.size == 1
    settings = {"learning_rate": 1e-2, "epsilon": 1e-3, "global_clipnorm": 0.3}
    optimizer = hvd.DistributedOptimizer(keras.optimizers.AdamW(**settings), model=sharded)
    plain = keras.optimizers.AdamW(**settings)
    for step in range(2):
        loss, gradients = expected(whole, sharded, step)
        value, found = sharded.train_step(*batch(step, 5))
        assert float(value) == pytest.approx(loss, abs=1e-5)
        by_variable = dict(zip(map(id, whole.trainable_variables), gradients, strict=True))
        for gradient, variable in zip(whole_gradients(sharded, found), whole.weights, strict=True):
            if variable.trainable:
                wanted = by_variable[id(variable)]
                np.testing.assert_allclose(gradient, wanted, atol=1e-5, rtol=1e-4, err_msg=variable.path)
        norm = float(sharded.global_norm(found, sharded.trainable_variables))
        assert norm == pytest.approx(np.sqrt(sum(float((g**2).sum()) for g in gradients)), rel=1e-4)
        optimizer.apply(found, sharded.trainable_variables)
        plain.apply([ops.convert_to_tensor(g) for g in gradients], whole.trainable_variables)
    same(sharded.state_dict(), whole, 1e-4)
    moments = sharded.optimizer_state_dict(optimizer)
    for moment, variable in zip(moments.values(), plain.variables, strict=True):
        np.testing.assert_allclose(moment, array(variable), atol=1e-4, rtol=1e-3, err_msg=variable.path)
    resumed = keras.optimizers.AdamW(**settings)
    sharded.load_optimizer_state_dict(resumed, moments)
    again = sharded.optimizer_state_dict(resumed)
    assert all((a == b).all() for a, b in zip(again.values(), moments.values(), strict=True))


def same(state: dict[str, np.ndarray], whole: keras.Model, close: float) -> None:
    for value, variable in zip(state.values(), whole.weights, strict=True):
        np.testing.assert_allclose(value, array(variable), atol=close, rtol=10 * close, err_msg=variable.path)


def test_fit_trains_layers_made_where_they_lie(driver: Any, size: int, rank: int) -> None:
    """A list of layers without values, in a run of fit: every rank of a copy reports the loss of one process."""
    mesh = mesh_of(size)
    listed = [keras.Input((CONTEXT,), dtype="int32"), layers.Embedding(VOCABULARY, WIDTH)]
    listed += [layers.Dense(22, activation="gelu"), layers.Dense(WIDTH), layers.Dense(VOCABULARY)]
    sharded = shard(listed, mesh)
    whole = cut_inside_without_noise()
    whole.set_weights(list(sharded.state_dict().values()))
    x, y = batch(0, 8)
    losses = []
    for model, optimizer in (
        (whole, keras.optimizers.Adam(1e-2)),
        (sharded.model, hvd.DistributedOptimizer(keras.optimizers.Adam(1e-2), model=sharded)),
    ):
        model.compile(optimizer, None if model is sharded.model else keras.losses.SparseCategoricalCrossentropy(True))
        losses.append(model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0).history["loss"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    same(sharded.state_dict(), whole, 1e-4)
    assert ("with tp=" in sharded.describe()) == (mesh.tp > 1)
    assert len(sharded.measured().events) == mesh.pp


def cut_inside_without_noise() -> keras.Model:
    return keras.Sequential(
        [keras.Input((CONTEXT,), dtype="int32"), layers.Embedding(VOCABULARY, WIDTH, name="table"),
         layers.Dense(22, activation="gelu"), layers.Dense(WIDTH), layers.Dense(VOCABULARY, name="head")]
    )  # fmt: skip


def test_logits_may_stay_apart(driver: Any, size: int) -> None:
    """A head by vocabulary, and a loss that knows of it."""
    mesh = mesh_of(size)

    def parallel(logits: Any, targets: Any) -> Any:
        return hvd.parallel_cross_entropy(logits, targets, VOCABULARY, mesh)

    rules = {"table": "vocab", "head": "vocab"}
    given, whole = cut_inside_without_noise(), cut_inside_without_noise()
    sharded = shard(given, mesh, loss=parallel, **({"rules": rules} if mesh.tp > 1 else {}))
    whole.set_weights(list(sharded.state_dict().values()))
    loss, gradients = expected(whole, sharded, 0)
    value, found = sharded.train_step(*batch(0, 5))
    assert float(value) == pytest.approx(loss, abs=1e-5)
    for gradient, wanted in zip(whole_gradients(sharded, found), gradients, strict=True):
        np.testing.assert_allclose(gradient, wanted, atol=1e-5, rtol=1e-4)


def test_copies_of_split_stages_train_on_their_own_data(driver: Any, size: int, rank: int) -> None:
    """dp x pp x tp = 2 x 2 x 2: weights are those of one process with the batches of both copies."""
    if size < 8:
        return
    mesh = hvd.Mesh(dp=2, pp=2, tp=2)
    dp = mesh.coordinates(rank).dp
    sharded, whole = shard(fresh("dropout"), mesh), fresh("dropout")
    optimizer = hvd.DistributedOptimizer(keras.optimizers.AdamW(1e-2, epsilon=1e-3), model=sharded)
    plain = keras.optimizers.AdamW(1e-2, epsilon=1e-3)
    for step in range(3):
        copies = [expected(whole, sharded, step, copy, 2 * step + copy) for copy in range(2)]
        loss, found = sharded.train_step(*batch(2 * step + dp, 5))
        assert float(loss) == pytest.approx(copies[dp][0], abs=1e-5)
        optimizer.apply(found, sharded.trainable_variables)
        means = [ops.convert_to_tensor((a + b) / 2) for a, b in zip(copies[0][1], copies[1][1], strict=True)]
        plain.apply(means, whole.trainable_variables)
    same(sharded.state_dict(), whole, 1e-4)


def table_by_itself() -> keras.Model:
    """The embedding's table in an operation, without a layer around it."""
    tokens = keras.Input((CONTEXT,), dtype="int32")
    table = layers.Embedding(VOCABULARY, WIDTH, name="table")
    return keras.Model(tokens, ops.matmul(layers.Dense(VOCABULARY)(table(tokens)), table.embeddings))


def test_what_cannot_be_is_refused_on_every_rank(driver: Any, rank: int, size: int) -> None:
    if size < 2:
        return
    mesh = mesh_of(size)
    for make, arguments, rule in (
        (tied, {"by": "graph"}, "stages are of whole layers"),
        (tied, {"rules": {"nothing": "column"}}, "'nothing' matches no layer"),
        (cut_inside, {"rules": {"embedding*": "vocab"}, "microbatches": 0}, "micro-batches"),
        (table_by_itself, {"rules": {"table": "vocab"}}, "uses it by itself, as a whole"),
    ):
        with pytest.raises(hvd.PlanError, match=rule):
            shard(make(), mesh, **arguments)
    sharded = shard(fresh("tied"), mesh)
    x, y = batch(rank)
    with pytest.raises(hvd.DesyncError, match="the values of x"):
        sharded.train_step(x, batch(0)[1])
    with pytest.raises(hvd.DesyncError, match="the values of y"):
        sharded.train_step(batch(0)[0], y)
    assert float(sharded.train_step(*batch(1))[0]) > 0
