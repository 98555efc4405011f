"""A Keras model cut into stages trains as it does in one process: loss, every gradient, statistics and weights."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import hvdscale.keras as hvd
from hvdscale.keras.backend import verbs
from hvdscale.keras.names import renumbered
from tests.contract.keras_pipelines import (
    MODELS,
    SAMPLES,
    SEED,
    alone,
    array,
    cross_entropy,
    drawn,
    fresh,
    rows_of,
    skipping,
    squares,
    tokens,
    vectors,
)
from tests.contract.sharding import ALONG_DATA

WAYS: dict[str, dict[str, Any]] = {
    "gpipe": {"schedule": "gpipe"},
    "1f1b": {"schedule": "1f1b"},
    "interleaved": {"schedule": "interleaved", "chunks": 2},
    "recompute": {"schedule": "1f1b", "recompute": True},
}
MICROBATCHES = (1, 2, 4, 7)
# A Latin square: every model in every way, with every number of micro-batches, and each of those in every way. In
# TensorFlow, which makes graphs for each, half of it.
SQUARE = [
    (name, way, MICROBATCHES[(i + j) % 4])
    for i, name in enumerate(MODELS)
    for j, way in enumerate(WAYS)
    if keras.backend.backend() == "torch" or (j - i) % 4 in (0, 3)
]


def shard(name: str, size: int, whole: Any = None, **more: Any) -> Any:
    model = MODELS[name]
    arguments = {"loss": model.loss, "seed": SEED, "by": model.by, "microbatches": 4, **more}
    whole = fresh(name) if whole is None else whole
    return hvd.shard_model(whole, arguments.pop("mesh", hvd.Mesh(pp=size)), **arguments)


def check_gradients(sharded: Any, found: list[Any], whole: Any, expected: list[Any], close: float = 1e-6) -> None:
    names = {id(v): name for v, name in zip(whole.weights, sharded.layout.names, strict=True)}
    by_name = {names[id(v)]: g for v, g in zip(whole.trainable_variables, expected, strict=True)}
    for variable, gradient in zip(sharded.trainable_variables, found, strict=True):
        wanted = by_name[variable.path]
        np.testing.assert_allclose(array(gradient), wanted, atol=close, rtol=1e-5, err_msg=variable.path)


def check_state(sharded: Any, whole: Any, close: float = 1e-6) -> None:
    state = sharded.state_dict()
    assert renumbered(list(state)) == renumbered([v.path for v in whole.weights])
    for value, variable in zip(state.values(), whole.weights, strict=True):
        np.testing.assert_allclose(value, array(variable), atol=close, rtol=10 * close, err_msg=variable.path)


def program_of(sharded: Any) -> Any:
    return sharded._stages._units


@pytest.mark.parametrize(("name", "way", "microbatches"), SQUARE)
def test_loss_and_gradients_are_those_of_one_process(
    driver: Any, size: int, name: str, way: str, microbatches: int
) -> None:
    model, (x, y) = MODELS[name], MODELS[name].data()
    whole = fresh(name)
    more = WAYS[way] if size > 1 or way != "interleaved" else {}
    sharded = shard(name, size, microbatches=microbatches, **more)
    for step in range(2):  # the second one knows all shapes
        loss, expected = alone(model, whole, x, y, microbatches, program_of(sharded), step)
        value, found = sharded.train_step(x, y)
        assert float(value) == pytest.approx(loss, abs=1e-6)
        check_gradients(sharded, found, whole, expected)
    check_state(sharded, whole)
    some = slice(0, 5)
    inputs, targets = (keras.tree.map_structure(ops.convert_to_tensor, rows_of(v, some)) for v in (x, y))
    expected_loss = float(model.of(whole(inputs, training=False), targets))
    assert float(sharded.eval_step(rows_of(x, some), rows_of(y, some))) == pytest.approx(expected_loss, abs=1e-6)
    assert sharded.steps == 2
    assert len(sharded.measured().events) == size


def test_one_micro_batch_is_as_the_whole(driver: Any, size: int) -> None:
    """Neither cutting nor sending changes more than the order of a sum."""
    whole = fresh("tied")
    sharded = shard("tied", size, microbatches=1)
    loss, expected = alone(MODELS["tied"], whole, *tokens(), 1, program_of(sharded))
    value, found = sharded.train_step(*tokens())
    assert float(value) == pytest.approx(loss, abs=1e-7)
    check_gradients(sharded, found, whole, expected, 1e-8)


def test_dropout_and_statistics_go_on_over_steps(driver: Any, size: int) -> None:
    """In a loop of one's own, with batches of unequal size."""
    whole = fresh("drawn")
    sharded = shard("drawn", size)
    plain = keras.optimizers.SGD(0.05, momentum=0.9, global_clipnorm=0.5)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.05, momentum=0.9, global_clipnorm=0.5), model=sharded)
    x, y = vectors()
    for step in range(6):
        rows = slice(0, SAMPLES - 6 * (step % 2))
        loss, expected = alone(MODELS["drawn"], whole, x[rows], y[rows], 4, program_of(sharded), step)
        value, found = sharded.train_step(x[rows], y[rows])
        assert float(value) == pytest.approx(loss, abs=1e-5), step
        optimizer.apply(found, sharded.trainable_variables)
        plain.apply([ops.convert_to_tensor(g) for g in expected], whole.trainable_variables)
    check_state(sharded, whole, 1e-5)


def test_fifty_steps_of_fit_track_one_process(driver: Any, size: int) -> None:
    """With moments, weight decay and a clip norm over the whole model, in which shared weights count once."""
    whole, ends = fresh("tied"), []
    sharded = shard("tied", size)
    x, y = tokens()
    for model, wrap in ((sharded.model, True), (whole, False)):
        optimizer = keras.optimizers.AdamW(2e-2, weight_decay=0.01, global_clipnorm=0.5, epsilon=1e-4)
        model.compile(hvd.DistributedOptimizer(optimizer, model=sharded) if wrap else optimizer, cross_entropy)
        often = [np.tile(a, (7, 1)) for a in (x, y)]  # 17 steps, the last one of two samples
        history = model.fit(*often, batch_size=6, epochs=3, shuffle=False, verbose=0).history["loss"]
        ends.append([*history, model.evaluate(x, y, verbose=0)])
    np.testing.assert_allclose(*ends, rtol=1e-4)
    assert ends[0][-1] < 0.95 * ends[0][0]
    check_state(sharded, whole, 2e-3)
    for call, rule in (
        (lambda: sharded.model.compile("sgd", metrics=["accuracy"]), "metrics cannot be given to compile"),
        (lambda: sharded.model.compile("sgd", "mse"), "loss cannot be given to compile"),
        (lambda: sharded.model.fit(x, y, sample_weight=np.ones(SAMPLES), verbose=0), "no sample weights"),
        (lambda: sharded.model(x), "cannot give the model's output alone"),
    ):
        with pytest.raises(hvd.PlanError, match=rule):
            call()


def test_the_whole_state_goes_into_one_process_and_back(driver: Any, rank: int, size: int) -> None:
    whole = fresh("skips")
    before = whole.get_weights()
    sharded = shard("skips", size, whole)
    assert all((a == b).all() for a, b in zip(sharded.state_dict().values(), before, strict=True))
    own = {id(v) for v in sharded.model.weights}
    given_up = [v for v in whole.weights if id(v) not in own]
    assert len(given_up) > 0 or size == 1
    for variable in given_up:
        assert variable._value is None
        with pytest.raises(hvd.StateError, match="lies on another rank of the pipeline"):
            ops.convert_to_numpy(variable.value)
    other = fresh("skips")
    other.set_weights([w * 2 for w in before])
    sharded.load_state_dict({v.path: array(v) for v in other.weights})
    state = sharded.state_dict()
    plain = skipping()
    plain.set_weights(list(state.values()))
    assert all((a == 2 * b).all() for a, b in zip(plain.get_weights(), before, strict=True))
    assert len(sharded.state_dict(root=size - 1)) == (len(state) if rank == size - 1 else 0)
    with pytest.raises(hvd.StateError, match="are missing"):
        sharded.load_state_dict(dict(list(state.items())[1:]))


def test_layers_that_no_rank_makes_whole(driver: Any, rank: int, size: int) -> None:
    """A list of layers: their weights are made where they are used, and copies of shared ones begin equal."""

    def build() -> list[Any]:
        table = layers.Embedding(12, 8, name="table")
        middle = [layers.Dense(8, activation="tanh", name=f"middle_{i}") for i in range(4)]
        return [keras.Input((5,), dtype="int32"), table, *middle, ops.tanh, layers.Dropout(0.2), Head(table)]

    class Head(layers.Layer):
        def __init__(self, table: Any) -> None:
            super().__init__(name="head")
            self.table = table

        def call(self, x: Any) -> Any:
            return ops.matmul(x, ops.transpose(self.table.embeddings))

    sharded = shard("tied", size, build(), sample=tokens()[0], balance="params")
    assert "embeddings is shared by stages" in sharded.describe() or size == 1
    whole, held = sharded.count()
    assert whole == 12 * 8 + 4 * 72
    assert held < whole or size == 1
    first = float(sharded.train_step(*tokens())[0])
    assert np.isfinite(first)
    state = sharded.state_dict()
    assert list(state)[:3] == ["table/embeddings", "middle_0/kernel", "middle_0/bias"]
    stacked = driver.everyones(np.concatenate([v.ravel() for v in state.values()]))
    assert (stacked == stacked[0]).all()
    own = [v for v in sharded.trainable_variables if v.path == "table/embeddings"]
    assert all((array(v) == state["table/embeddings"]).all() for v in own)


def test_copies_train_on_their_own_data(driver: Any, rank: int, size: int) -> None:
    """dp = size, of one stage each: from rank 0's weights, gradients are those of one process with all batches."""
    whole, mine = fresh("tied"), fresh("tied")
    mine.set_weights([w * (rank + 1) for w in mine.get_weights()])
    sharded = shard("tied", size, mine, mesh=hvd.Mesh(dp=size), microbatches=2)
    x, y = tokens()
    rows = SAMPLES // size
    own = slice(rank * rows, (rank + 1) * rows)
    _, expected = alone(MODELS["tied"], whole, x[: rows * size], y[: rows * size], size, program_of(sharded))
    _, found = sharded.train_step(x[own], y[own])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), model=sharded)
    optimizer.apply(found, sharded.trainable_variables)
    plain = keras.optimizers.SGD(0.1)
    plain.apply([ops.convert_to_tensor(g) for g in expected], whole.trainable_variables)
    check_state(sharded, whole)


def test_half_precision_travels_as_it_is(driver: Any, size: int) -> None:
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        whole = fresh("tied")
        sharded = shard("tied", size)
    finally:
        keras.config.set_dtype_policy("float32")
    loss, expected = alone(MODELS["tied"], whole, *tokens(), 4, program_of(sharded))
    value, found = sharded.train_step(*tokens(), loss_scale=8.0)
    assert float(value) == pytest.approx(loss, abs=1e-2)
    check_gradients(sharded, [array(g) / 8 for g in found], whole, expected, 1e-2)


def test_a_mean_over_fewer_terms_is_told_by_count(driver: Any, size: int) -> None:
    def mean(outputs: Any, targets: Any) -> Any:
        each = keras.losses.sparse_categorical_crossentropy(targets, outputs, from_logits=True, ignore_class=0)
        return ops.sum(each) / ops.cast(ops.sum(targets != 0), "float32")

    x, y = tokens()
    y = np.where(np.arange(SAMPLES)[:, None] > 4, y, 0)  # whole micro-batches without a term
    whole = fresh("tied")
    expected = float(mean(whole(ops.convert_to_tensor(x)), ops.convert_to_tensor(y)))
    sharded = shard("tied", size, loss=mean, microbatches=7, count=lambda targets: ops.sum(targets != 0))
    assert float(sharded.eval_step(x, y)) == pytest.approx(expected, abs=1e-6)
    wrong = shard("tied", size, loss=mean, microbatches=2)
    with pytest.raises(hvd.PlanError, match="count=lambda y"):
        wrong.train_step(x[3:], y[3:])


class Own(keras.Model):
    """A model with a ``call`` of its own, and a weight that belongs to no layer."""

    def __init__(self, branches: bool = False) -> None:
        super().__init__()
        self.branches = branches
        self.first, self.last = layers.Dense(8), layers.Dense(3)
        self.blocks = [layers.Dense(8, activation="tanh") for _ in range(4)]
        self.scale = self.add_weight((8,), initializer="ones", name="scale")

    def call(self, x: Any) -> Any:
        x = first = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        if self.branches and ops.convert_to_numpy(x).sum() > 0:
            x = -x
        return self.last(x * self.scale + first)


def test_a_model_with_a_call_of_its_own_is_captured(driver: Any, size: int) -> None:
    x, y = vectors()
    whole = Own()
    whole(ops.convert_to_tensor(x))
    whole.set_weights([driver.everyones(w)[0] for w in whole.get_weights()])
    state = whole.get_weights()
    expected, gradients = verbs.value_and_gradients(
        lambda: squares(whole(ops.convert_to_tensor(x)), ops.convert_to_tensor(y)), list(whole.trainable_variables)
    )
    wanted = {v.path: array(g) for v, g in zip(whole.trainable_variables, gradients, strict=True)}
    sharded = hvd.shard_model(whole, hvd.Mesh(pp=size), by="graph", loss=squares, microbatches=2, sample=x)
    assert all((a == b).all() for a, b in zip(sharded.state_dict().values(), state, strict=True))
    value, found = sharded.train_step(x, y)
    assert float(value) == pytest.approx(float(expected), abs=1e-6)
    for variable, gradient in zip(sharded.trainable_variables, found, strict=True):
        np.testing.assert_allclose(array(gradient), wanted[variable.path], atol=1e-6, rtol=1e-5)
    assert sum(driver.everyones(np.array([len(found)]))) == len(state)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "more stages than layers": (
        lambda: keras.Sequential([keras.Input((6,)), layers.Dense(3)]),
        {"chunks": 3, "schedule": "gpipe"},
        "needs a layer; the model has 1",
    ),
    "a mesh of another size": (drawn, {"mesh": hvd.Mesh(pp=7)}, "1 \\* 7 \\* 1 = 7"),
    "features": (drawn, {"rules": {"x": "column"}}, "Leave them out"),
    "a loss that is no mean": (drawn, {"loss": keras.losses.MeanSquaredError("sum")}, "its reduction is 'sum'"),
    "no loss": (drawn, {"loss": None}, "give loss="),
    "no such loss": (drawn, {"loss": "mean"}, "not the name of a loss"),
    "no layers": (lambda: "model", {}, "this str is none of these"),
    "a model of one's own": (Own, {}, 'use by="graph"'),
    "not built": (lambda: keras.Sequential([layers.Dense(3)]), {}, "call model.build"),
    "a list without an input": (lambda: [layers.Dense(3)], {}, "begins with keras.Input"),
    "no layer in the list": (lambda: [keras.Input((6,)), 3], {}, "number 0 is 3"),
    "data-dependent control flow": (
        lambda: Own(branches=True),
        {"by": "graph", "sample": vectors()[0]},
        "Own.call cannot be captured",
    ),
    "a regularizer": (
        lambda: keras.Sequential([keras.Input((6,)), layers.Dense(3, kernel_regularizer="l2"), layers.ReLU()]),
        {},
        "has a regularizer",
    ),
    "an unknown schedule": (drawn, {"schedule": "2f2b"}, "'2f2b' is none"),
    "time without a sample": (drawn, {"balance": "time"}, "give sample="),
    "no memory": (drawn, {"memory_cap": 10.0}, "more than 10 bytes"),
    "an unknown way": (drawn, {"by": "rows"}, "by is 'layers', 'graph' or 'features'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_on_every_rank(driver: Any, size: int, what: str) -> None:
    make, more, rule = REFUSED[what]
    arguments = {"mesh": hvd.Mesh(pp=size), "loss": squares, **more}
    with pytest.raises(hvd.PlanError, match=rule):
        hvd.shard_model(make(), **arguments)


def test_ranks_and_batches_that_differ_are_told_and_training_goes_on(driver: Any, rank: int, size: int) -> None:
    x, y = vectors()
    whole = fresh("drawn")
    sharded = shard("drawn", size, schedule="zb", microbatches=2)
    assert '"zb" runs as "1f1b"' in sharded.describe()
    with pytest.raises(hvd.PlanError, match="x and y have as many samples; they have 14 and 13"):
        sharded.train_step(x, y[:-1])
    with pytest.raises(hvd.PlanError, match="last stage reads the target"):
        sharded.train_step(x, None)
    with pytest.raises(hvd.PlanError, match="at least one sample"):
        sharded.train_step(x[:0], y[:0])
    wrong = shard("drawn", size, loss=lambda outputs, targets: ops.sum(ops.square(outputs - targets)))
    with pytest.raises(hvd.PlanError, match="for the same samples twice"):
        wrong.train_step(x, y)
    loss, expected = alone(MODELS["drawn"], whole, x, y, 2, program_of(sharded))
    mine = {"x": x if rank == 0 else None, "y": y if rank == size - 1 else None}  # only the ends need the batch
    value, found = sharded.train_step(**mine)
    assert float(value) == pytest.approx(loss, abs=1e-6)
    check_gradients(sharded, found, whole, expected)
    if size == 1:
        return
    with pytest.raises(hvd.DesyncError, match="same batch"):
        sharded.train_step(x[: 10 + rank], y[: 10 + rank])
    other = keras.Sequential([keras.Input((6,)), layers.Dense(7 + rank), layers.Dense(3)])
    with pytest.raises(hvd.DesyncError, match=r"the model to be sharded: rank \d differs from rank 0"):
        hvd.shard_model(other, hvd.Mesh(pp=size), loss=squares)


class Heavy(layers.Layer):
    """Takes far longer than any other layer of these models, and holds next to nothing."""

    def build(self, shape: Any) -> None:
        self.scale = self.add_weight((8,), initializer="ones", name="scale")

    def call(self, x: Any) -> Any:
        y = ops.ones((400, 400)) * ops.mean(x)  # of x, or a graph computes it once
        for _ in range(30):
            y = ops.tanh(ops.matmul(y, y))
        return x * self.scale + 1e-12 * ops.max(y)


def test_stages_are_cut_by_measured_time(driver: Any, rank: int, size: int) -> None:
    """By parameters, the wide layers in front would be cut apart."""
    x, y = vectors()

    def build() -> keras.Model:
        wide = [layers.Dense(64), layers.Dense(8)]
        return keras.Sequential(
            [keras.Input((6,)), *wide, *(layers.ReLU() for _ in range(3)), Heavy(), layers.Dense(3)]
        )

    whole = build()
    state = [driver.everyones(w)[0] for w in whole.get_weights()]
    whole.set_weights(state)
    expected = float(squares(whole(ops.convert_to_tensor(x)), ops.convert_to_tensor(y)))
    cuts = {}
    for balance in ("params", "time"):
        model = build()
        model.set_weights(state)
        sharded = hvd.shard_model(
            model,
            hvd.Mesh(pp=size),
            loss=squares,
            microbatches=2,
            balance=balance,
            sample=x if balance == "time" else None,
        )
        cuts[balance] = sharded.pipeline.part.parts
        assert float(sharded.eval_step(x, y)) == pytest.approx(expected, abs=1e-6)
    if size > 1:
        (alone,) = (part for part in cuts["time"] if 5 in part)  # the heavy one's
        assert set(alone) <= {5, 6}
        assert cuts["params"][0][-1] < 2
        assert "balanced by time" in sharded.describe()
        assert set(driver.everyones(np.array(cuts["time"][0]))[:, -1]) == {cuts["time"][0][-1]}


class AddsALoss(layers.Layer):
    def call(self, x: Any) -> Any:
        self.add_loss(ops.mean(ops.square(x)))
        return x


def test_a_layer_that_adds_a_loss_is_refused_on_every_rank(driver: Any, size: int) -> None:
    x, y = vectors()
    model = keras.Sequential([keras.Input((6,)), layers.Dense(8), layers.Dense(8), AddsALoss(), layers.Dense(3)])
    sharded = hvd.shard_model(model, hvd.Mesh(pp=size), loss=squares, microbatches=2)
    for _ in range(2):  # and again, though a graph is traced once
        with pytest.raises(hvd.PlanError, match="adds a loss of its own, which a pipeline does not count"):
            sharded.train_step(x, y)


@pytest.mark.parametrize("plan", ALONG_DATA)
def test_copies_of_a_pipeline_meet_in_rounds(driver: Any, rank: int, size: int, plan: str) -> None:
    """Each copy trains on its own data, and each stage meets its twin; a shared weight stays one."""
    if size % 2:
        return
    mesh = hvd.Mesh(dp=2, pp=size // 2)
    model, (x, y) = MODELS["tied"], tokens()
    sharded = shard("tied", size, mesh=mesh, microbatches=1)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.5), model=sharded, sync=ALONG_DATA[plan])
    wholes = [fresh("tied") for _ in range(2)]
    plains = [keras.optimizers.SGD(0.1, momentum=0.5) for _ in wholes]
    rows = (slice(0, 8), slice(6, SAMPLES))
    mine = rows[mesh.coordinates(rank).dp]
    for step in range(1, 5):
        _, found = sharded.train_step(x[mine], y[mine])
        optimizer.apply(found, sharded.trainable_variables)
        gradients = [
            alone(model, whole, x[part], y[part], 1, program_of(sharded))[1]
            for whole, part in zip(wholes, rows, strict=True)
        ]
        if plan == "warm-up, overlap" and step <= 2:
            gradients = [[(a + b) / 2 for a, b in zip(*gradients, strict=True)]] * 2
        for whole, plain, gradient in zip(wholes, plains, gradients, strict=True):
            plain.apply([ops.convert_to_tensor(g) for g in gradient], whole.trainable_variables)
        if plan != "warm-up, overlap" and step % 2 == 0:
            average(wholes)
    if plan == "warm-up, overlap":
        optimizer.sync.flush()
        average(wholes)
    check_state(sharded, wholes[0], 1e-5)
    optimizer.sync.flush()
    assert optimizer.sync.metrics()["rounds"] >= 2


def average(models: list[Any]) -> None:
    means = [sum(same) / len(models) for same in zip(*(m.get_weights() for m in models), strict=True)]
    for model in models:
        model.set_weights(means)


@pytest.mark.parametrize(("name", "way", "microbatches"), [("drawn", "1f1b", 7), ("skips", "recompute", 2)])
def test_four_stages(driver: Any, size: int, name: str, way: str, microbatches: int) -> None:
    """On four ranks; elsewhere the square above has had as many stages as there are ranks."""
    if size == 4:
        test_loss_and_gradients_are_those_of_one_process(driver, size, name, way, microbatches)


def test_plain_tensorflow_has_the_same_names(driver: Any, size: int) -> None:
    """And says what it cannot shard."""
    if keras.backend.backend() != "tensorflow":
        return
    import tensorflow as tf

    import hvdscale.tensorflow as plain

    assert plain.Mesh is hvd.Mesh
    assert plain.ShardedModel is hvd.ShardedModel
    sharded = plain.shard_model(fresh("tied"), plain.Mesh(pp=size), loss=cross_entropy)
    assert isinstance(sharded, plain.ShardedModel)
    for model, what in ((tf.Module(), "a Module"), (lambda x: x, "a function")):
        with pytest.raises(hvd.PlanError, match=f"it was given {what}, whose layers nobody knows"):
            plain.shard_model(model, plain.Mesh(pp=size), loss=cross_entropy)
    logits, targets = tf.constant(np.eye(3, 5, dtype="float32")), tf.constant([0, 1, 2])
    loss = plain.parallel_cross_entropy(logits, targets, 5, plain.Mesh(dp=size))
    assert float(loss) == pytest.approx(float(cross_entropy(targets, logits)), abs=1e-6)
