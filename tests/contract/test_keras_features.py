"""Sharding by features in Keras, on both backends: loss, gradients and a run of fit are those of one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import hvdscale.keras as hvd
from hvdscale.keras.names import renumbered
from tests.contract.sharding import meshes

VOCABULARY, CONTEXT, WIDTH, HEADS = 29, 6, 12, 3


class Mlp(layers.Layer):
    """By the usual names, in a layer of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = layers.Dense(13, activation="silu"), layers.Dense(13)
        self.w2 = layers.Dense(WIDTH)

    def build(self, shape: Any) -> None:
        self.w1.build(shape)
        self.w3.build(shape)
        self.w2.build((*shape[:-1], 13))

    def call(self, x: Any) -> Any:
        return self.w2(self.w1(x) * self.w3(x))


def functional(drop: float = 0.0, own: bool = False) -> keras.Model:
    tokens = keras.Input((CONTEXT,), dtype="int32")
    x = layers.Embedding(VOCABULARY, WIDTH)(tokens)
    for i in range(2):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(HEADS, 4, dropout=drop, seed=2 * i)(y, y, use_causal_mask=True)
        y = layers.LayerNormalization()(x)
        if own:
            y = Mlp()(y)
        else:
            y = layers.Dense(22, activation="gelu")(y)
            y = layers.Dropout(drop, seed=2 * i + 1)(y) if drop else y
            y = layers.Dense(WIDTH)(y)
        x = x + layers.Dropout(drop, seed=7)(y) if drop else x + y
    return keras.Model(tokens, layers.Dense(VOCABULARY)(layers.LayerNormalization()(x)))


MODELS: dict[str, Callable[[], keras.Model]] = {
    "functional": functional,
    "dropout": lambda: functional(0.3),
    "own": lambda: functional(own=True),
}


def make(name: str) -> keras.Model:
    model = MODELS[name]()
    draw = np.random.default_rng(5)
    model.set_weights([draw.normal(0, 0.3, w.shape).astype("float32") for w in model.get_weights()])
    return model


def loss_of(logits: Any, targets: Any) -> Any:
    return ops.mean(keras.losses.sparse_categorical_crossentropy(targets, logits, from_logits=True))


def batch(seed: int, rows: int = 4) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, (rows, CONTEXT + 1)).astype("int32")
    return tokens[:, :-1], tokens[:, 1:]


def share(mesh: hvd.Mesh, seed: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = batch(seed, 4 * mesh.dp)
    place = 4 * mesh.coordinates(hvd.rank()).dp
    return x[place : place + 4], y[place : place + 4]


def alone_step(model: keras.Model, x: np.ndarray, y: np.ndarray) -> tuple[float, list[np.ndarray]]:
    from hvdscale.keras.backend import verbs

    loss, gradients = verbs.value_and_gradients(
        lambda: loss_of(model(x, training=True), y), list(model.trainable_variables)
    )
    return float(loss), [np.asarray(ops.convert_to_numpy(verbs.as_dense(g))) for g in gradients]


def whole_gradients(sharded: hvd.ShardedModel, gradients: list[Any]) -> list[np.ndarray]:
    """As the whole model's, by way of the weights' own road."""
    from hvdscale.keras.backend import verbs

    kept = [np.array(ops.convert_to_numpy(v)) for v in sharded.trainable_variables]
    for variable, gradient in zip(sharded.trainable_variables, gradients, strict=True):
        variable.assign(verbs.as_dense(gradient))
    found = sharded.state_dict()
    for variable, value in zip(sharded.trainable_variables, kept, strict=True):
        variable.assign(value)
    return list(found.values())


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_and_every_gradient_are_those_of_one_process(driver: Any, size: int, name: str) -> None:
    mesh = hvd.Mesh(tp=size)
    keras.utils.set_random_seed(4)
    alone = make(name)
    keras.utils.set_random_seed(4)
    sharded = hvd.shard_model(make(name), mesh, by="features", loss=loss_of)
    whole, held = sharded.count()
    assert whole == sum(int(np.prod(v.shape)) for v in alone.trainable_variables)
    assert held < whole * 0.8 or size == 1  # three heads on two ranks are two and one
    x, y = batch(0)
    keras.utils.set_random_seed(9)
    wanted, gradients = alone_step(alone, x, y)
    keras.utils.set_random_seed(9)
    loss, found = sharded.train_step(x, y)
    assert float(loss) == pytest.approx(wanted, abs=1e-5)
    for gradient, value in zip(whole_gradients(sharded, found), gradients, strict=True):
        np.testing.assert_allclose(gradient, value, atol=2e-6, rtol=1e-5)
    evaluated = float(sharded.eval_step(x, y))
    assert evaluated == pytest.approx(float(loss_of(alone(x, training=False), y)), abs=1e-5)
    norm = float(sharded.global_norm(found, sharded.trainable_variables))
    assert norm == pytest.approx(float(np.sqrt(sum((g**2).sum() for g in gradients))), rel=1e-5)
    assert {"heads", "column", "row", "vocab"} <= set(sharded.describe().split())


@pytest.mark.parametrize("mesh", meshes("dp", "tp"), ids=str)
def test_fit_tracks_one_process(driver: Any, mesh: hvd.Mesh) -> None:
    steps = 100
    model = make("functional")
    sharded = hvd.shard_model(model, mesh, by="features")
    alone = make("functional")
    ends = []
    for trained, rows, wrap in (
        (alone, lambda s: batch(s, 4 * mesh.dp), False),
        (model, lambda s: share(mesh, s), True),
    ):
        optimizer = keras.optimizers.AdamW(3e-3, epsilon=1e-6, global_clipnorm=1.0)
        optimizer = hvd.DistributedOptimizer(optimizer, model=sharded) if wrap else optimizer
        trained.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        trained.fit((rows(s) for s in range(steps)), steps_per_epoch=steps, verbose=0)
        x, y = batch(1000, 32)
        ends.append(trained.evaluate(x, y, verbose=0))
    assert ends[1] == pytest.approx(ends[0], rel=2e-4)
    for name, value in zip(sharded.layout.names, alone.get_weights(), strict=True):
        whole = sharded.state_dict()[name]
        np.testing.assert_allclose(whole, value, atol=2e-3, err_msg=name)
    for name, variable in zip(sharded.layout.names, model.weights, strict=True):  # copies stay equal to the bit
        if sharded.layout[name].split is None:
            copies = driver.everyones(np.asarray(ops.convert_to_numpy(variable)))
            assert (copies == copies[0]).all(), name


def test_the_whole_state_moves_to_any_mesh_to_the_bit(driver: Any, size: int) -> None:
    plain = make("functional")
    whole = dict(zip([v.path for v in plain.weights], plain.get_weights(), strict=True))
    state: dict[str, np.ndarray] = whole
    for mesh in meshes("dp", "tp"):
        other = functional()
        sharded = hvd.shard_model(other, mesh, by="features")
        sharded.load_state_dict(state)
        state = sharded.state_dict()
        assert list(state) == [v.path for v in other.weights]
        for found, value in zip(state.values(), whole.values(), strict=True):
            assert found.tobytes() == value.tobytes()
        on_root = sharded.state_dict(root=size - 1)
        assert len(on_root) == (len(whole) if hvd.rank() == size - 1 else 0)
    fresh = functional()
    fresh.set_weights(list(state.values()))
    x, _ = batch(0)
    np.testing.assert_allclose(np.asarray(ops.convert_to_numpy(fresh(x))), np.asarray(ops.convert_to_numpy(plain(x))))
    with pytest.raises(hvd.StateError, match="are missing"):
        sharded.load_state_dict(dict(list(state.items())[1:]))
    assert renumbered(["a_7/dense_3/k", "a_7/dense_9/k", "a_8/dense_1/k"]) == [
        "a/dense/k",
        "a/dense_1/k",
        "a_1/dense/k",
    ]


def test_cross_entropy_over_a_split_vocabulary(driver: Any, size: int) -> None:
    mesh = hvd.Mesh(tp=size)
    rules = {"*": "vocab"}
    dense = keras.Sequential([keras.Input((7,)), layers.Dense(VOCABULARY)])
    draw = np.random.default_rng(1)
    dense.set_weights([draw.normal(0, 3, w.shape).astype("float32") for w in dense.get_weights()])
    x, y = draw.normal(size=(5, 7)).astype("float32"), draw.integers(0, VOCABULARY, 5).astype("int32")
    wanted, gradients = alone_step(dense, x, y)
    sharded = hvd.shard_model(
        dense, mesh, by="features", rules=rules, loss=lambda z, t: hvd.parallel_cross_entropy(z, t, VOCABULARY, mesh)
    )
    loss, found = sharded.train_step(x, y)
    assert float(loss) == pytest.approx(wanted, abs=1e-5)
    for gradient, value in zip(whole_gradients(sharded, found), gradients, strict=True):
        np.testing.assert_allclose(gradient, value, atol=2e-6, rtol=1e-5)
    parts, some = sharded(x), np.where(np.arange(5) < 2, -100, y)

    def of(targets: np.ndarray, **named: Any) -> np.ndarray:
        return np.asarray(ops.convert_to_numpy(hvd.parallel_cross_entropy(parts, targets, VOCABULARY, mesh, **named)))

    each = of(y, reduction="none")
    assert each.mean() == pytest.approx(wanted, abs=1e-5)
    np.testing.assert_allclose(of(some, reduction="none"), [0, 0, *each[2:]], rtol=1e-6)
    assert of(some) == pytest.approx(each[2:].mean(), rel=1e-6)
    assert of(np.where(some < 0, 77, some), ignore_index=77, reduction="sum") == pytest.approx(each[2:].sum(), rel=1e-6)
    for wrong, rule in ((some - 1, "targets are classes 0 to 28; -101"), (y[:, None], "logits are this rank's part")):
        with pytest.raises(hvd.PlanError, match=rule):
            of(wrong)


def test_ids_beyond_the_vocabulary_are_errors(driver: Any, size: int) -> None:
    sharded = hvd.shard_model(make("functional"), hvd.Mesh(tp=size), by="features")
    ids = batch(0)[0].copy()
    ids[1, 2] = VOCABULARY
    with pytest.raises(IndexError, match=r"ids lie in 0\.\.28; 29 came"):
        sharded(ids)
    with pytest.raises(Exception, match=r"ids lie in 0\.\.28; 29 came"):  # in a graph, the backend's own
        sharded.model.predict(ids, verbose=0)


def test_einsum_layers_and_halves_of_pairs(driver: Any, size: int) -> None:
    inputs = keras.Input((5, 8))
    x = layers.EinsumDense("abc,cd->abd", (5, 10), bias_axes="d", activation="tanh", name="one")(inputs)
    x = layers.EinsumDense("...d,de->...e", 6, bias_axes="e", name="two")(x)
    x = layers.EinsumDense("abe,ef->abf", (5, 9), bias_axes="bf", name="three")(x)
    outputs = layers.Dense(4, name="four")(x)
    model = keras.Model(inputs, outputs)
    sample = np.random.default_rng(0).normal(size=(2, 5, 8)).astype("float32")
    wanted = np.asarray(ops.convert_to_numpy(model(sample)))
    wanted = driver.everyones(wanted)[0]
    sharded = hvd.shard_model(
        model, hvd.Mesh(tp=size), by="features", rules={"one": "column", "two": "row", "three": "column", "four": "row"}
    )
    np.testing.assert_allclose(np.asarray(ops.convert_to_numpy(sharded(sample))), wanted, atol=1e-5)


def test_weights_that_no_rank_has_whole(driver: Any, size: int) -> None:
    with keras.StatelessScope(initialize_variables=False):
        model = functional()
    assert all(v._value is None for v in model.weights)
    sharded = hvd.shard_model(model, hvd.Mesh(tp=size), by="features")
    with keras.StatelessScope():
        later = layers.Dense(2)
        later.build((None, 3))  # Keras gives values to what waits for them, and to nothing else
    assert later.kernel._value is not None
    x, _ = batch(0)
    plain = functional()
    plain.set_weights(list(sharded.state_dict().values()))
    np.testing.assert_allclose(
        np.asarray(ops.convert_to_numpy(sharded(x))), np.asarray(ops.convert_to_numpy(plain(x))), atol=1e-5
    )


def test_loss_scaling_skips_the_same_steps_on_all_ranks(driver: Any, size: int, rank: int) -> None:
    sharded = hvd.shard_model(make("functional"), hvd.Mesh(tp=size), by="features", loss=loss_of)
    inner = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), model=sharded)
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=1.0)
    optimizer.build(sharded.trainable_variables)
    for bad in (True, False):
        before = [np.array(ops.convert_to_numpy(v)) for v in sharded.trainable_variables]
        _, gradients = sharded.train_step(*batch(0))
        if bad and rank == size - 1:  # in a part that this rank alone holds
            at = next(i for i, v in enumerate(sharded.trainable_variables) if "query/kernel" in v.path)
            gradients[at] = gradients[at] * float("inf")
        optimizer.apply(gradients, sharded.trainable_variables)
        after = [np.array(ops.convert_to_numpy(v)) for v in sharded.trainable_variables]
        assert all((a == b).all() for a, b in zip(after, before, strict=True)) == bad


REFUSED = [
    ({"by": "rows"}, "by is 'layers', 'graph' or 'features'; it is 'rows'"),
    ({"mesh": "tp=2"}, "mesh is a Mesh, such as"),
    ({"mesh": hvd.Mesh(tp=64)}, r"dp \* pp \* tp must be the number of ranks"),
    ({"rules": {"nowhere*": "column"}}, "matches no layer that can be split. Those are: embedding"),
    ({"rules": {"dense*": "heads"}}, "is a Dense, which can be 'column' or 'row' or 'vocab'"),
    ({"rules": {"embedding*": "row"}}, "is a Embedding, which can be 'vocab'"),
    ({"model": lambda: keras.Sequential([keras.Input((3,)), layers.ReLU()])}, 'rules="auto" found no'),
    ({"model": lambda: keras.Sequential([layers.Dense(3)])}, "The model has no variables yet"),
    ({"model": lambda: "model"}, "model is a keras.Model; it is a str"),
]


@pytest.mark.parametrize(("change", "rule"), REFUSED, ids=[rule[:20] for _, rule in REFUSED])
def test_what_cannot_be_is_refused(driver: Any, size: int, change: dict[str, Any], rule: str) -> None:
    arguments = {"model": functional, "mesh": hvd.Mesh(tp=size), "by": "features", **change}
    with pytest.raises(hvd.PlanError, match=rule):
        hvd.shard_model(arguments.pop("model")(), **arguments)


def test_more_is_refused_where_there_are_ranks(driver: Any, size: int, rank: int) -> None:
    mesh = hvd.Mesh(tp=size)
    sharded = hvd.shard_model(make("functional"), mesh, by="features")
    with pytest.raises(hvd.PlanError, match=r"clipnorm=1\.0 looks at whole variables"):
        hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, clipnorm=1.0), model=sharded)
    with pytest.raises(hvd.PlanError, match="Adafactor looks at whole variables"):
        hvd.DistributedOptimizer(keras.optimizers.Adafactor(), model=sharded)
    with pytest.raises(hvd.PlanError, match="without a loss"):
        sharded.train_step(*batch(0))
    if size == 1:
        return
    small = keras.Sequential([keras.Input((8,)), layers.Dense(1, name="small")])
    with pytest.raises(hvd.PlanError, match=r"an axis of 1 cannot be divided over tp="):
        hvd.shard_model(small, mesh, by="features", rules={"small": "column"})
    other = keras.Sequential([keras.Input((4,)), layers.Dense(8 + rank, name="other")])
    with pytest.raises(hvd.DesyncError, match="Ranks disagree about the model to be sharded"):
        hvd.shard_model(other, mesh, by="features", rules={"other": "column"})
    sharded.model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), run_eagerly=True)
    with pytest.raises(hvd.DesyncError, match="were given another batch"):
        sharded.model.fit(*batch(rank), verbose=0)
