"""Models that Keras pipelines are tested with, and what one process gives for them: whole models in plain Keras, one
micro-batch after another, with the random numbers of a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from hvdscale.keras.backend import verbs
from hvdscale.model.batch import cut
from hvdscale.model.seeds import seed_of

SEED, SAMPLES = 11, 14


class TiedHead(layers.Layer):
    """Logits from the embedding's own table."""

    def __init__(self, table: Any) -> None:
        super().__init__()
        self.table = table
        self.built = True

    def call(self, x: Any) -> Any:
        return ops.matmul(x, ops.transpose(self.table.embeddings))


class Noisy(layers.Layer):
    """Dropout inside, and no argument that says whether it learns."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.drop = layers.Dense(8, activation="tanh"), layers.Dropout(0.4, seed=3)

    def build(self, shape: Any) -> None:
        self.dense.build(shape)

    def call(self, x: Any) -> Any:
        return self.drop(self.dense(x))


def drawn() -> keras.Model:
    """Dropout and batch normalisation, a Sequential inside."""
    middle = keras.Sequential([layers.BatchNormalization(), layers.ReLU(), layers.Dropout(0.3, seed=1)])
    return keras.Sequential(
        [keras.Input((6,)), layers.Dense(8), middle, layers.Dense(8), Noisy(), layers.BatchNormalization(),
         layers.Dropout(0.5, seed=2), layers.Dense(8, activation="gelu"), layers.Dense(3)]
    )  # fmt: skip


def skipping() -> keras.Model:
    """Connections past stages, a layer used twice, two inputs, masks, a model inside, two outputs."""
    tokens, extra = keras.Input((5,), dtype="int32", name="tokens"), keras.Input((6,), name="extra")
    x = first = layers.Embedding(12, 8, mask_zero=True)(tokens)
    twice = layers.Dense(8, activation="tanh", name="twice")
    x = layers.Multiply()([twice(x), first])
    inside = keras.Input((5, 8))
    x = keras.Model(inside, layers.Add()([layers.Dense(8)(layers.LayerNormalization()(inside)), inside]))(x)
    x = layers.GlobalAveragePooling1D()(layers.Dense(8)(layers.Dense(8)(x)))  # masks cross, wherever it is cut
    x = ops.tanh(x) + layers.Dense(8)(extra)
    x = twice(layers.Dense(8)(x)) + ops.mean(first, 1)
    return keras.Model({"tokens": tokens, "extra": extra}, [layers.Dense(3)(x), layers.Dense(1)(x)])


def tied() -> keras.Model:
    tokens = keras.Input((5,), dtype="int32")
    table = layers.Embedding(12, 8)
    x = table(tokens)
    for _ in range(4):
        x = layers.Dense(8, activation="tanh")(x)
    return keras.Model(tokens, TiedHead(table)(x))


def vectors() -> tuple[Any, Any]:
    draw = np.random.default_rng(4)
    return draw.normal(size=(SAMPLES, 6)).astype("float32"), draw.normal(size=(SAMPLES, 3)).astype("float32")


def tokens() -> tuple[Any, Any]:
    draw = np.random.default_rng(3)
    return draw.integers(0, 12, (SAMPLES, 5)).astype("int32"), draw.integers(0, 12, (SAMPLES, 5)).astype("int32")


def both() -> tuple[Any, Any]:
    (ids, _), (x, y) = tokens(), vectors()
    return {"tokens": ids, "extra": x}, [y, y[:, :1]]


def squares(outputs: Any, targets: Any) -> Any:
    return ops.mean(ops.square(outputs - targets))


def squares_of_both(outputs: Any, targets: Any) -> Any:
    return sum(squares(o, t) for o, t in zip(outputs, targets, strict=True))


cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@dataclass(frozen=True)
class Model:
    """A way to build a model, the data it takes, and its loss."""

    make: Callable[[], keras.Model]
    data: Callable[[], tuple[Any, Any]]
    loss: Any
    by: str = "layers"

    def of(self, outputs: Any, targets: Any) -> Any:
        return self.loss(targets, outputs) if isinstance(self.loss, keras.losses.Loss) else self.loss(outputs, targets)


MODELS = {
    "drawn": Model(drawn, vectors, squares),
    "tied": Model(tied, tokens, cross_entropy),
    "skips": Model(skipping, both, squares_of_both),
    "graph": Model(skipping, both, squares_of_both, "graph"),
}


def fresh(name: str) -> keras.Model:
    model = MODELS[name].make()
    draw = np.random.default_rng(5)
    model.set_weights([draw.normal(0, 0.4, w.shape).astype("float32") ** 2 for w in model.get_weights()])
    return model


def rows_of(value: Any, rows: slice) -> Any:
    return keras.tree.map_structure(lambda a: a[rows], value)


def alone(
    model: Model, whole: keras.Model, x: Any, y: Any, microbatches: int, program: Any, step: int = 0, dp: int = 0
) -> tuple[float, list[Any]]:
    """Loss of a step of one process, and the gradients as arrays.

    ``program``: of the sharded model, whose units random numbers are named after.
    """
    samples = len(keras.tree.flatten(y)[0])
    total, sums = 0.0, [np.zeros(v.shape, "float32") for v in whole.trainable_variables]
    for m, piece in enumerate(cut(samples, microbatches)):
        _seed(whole, program, (SEED, dp, step, m))
        share = (piece.stop - piece.start) / samples
        inputs, targets = (keras.tree.map_structure(ops.convert_to_tensor, rows_of(v, piece)) for v in (x, y))
        loss, gradients = verbs.value_and_gradients(
            lambda i=inputs, t=targets: model.of(whole(i, training=True), t), list(whole.trainable_variables)
        )
        total += float(loss) * share
        sums = [s + array(g) * share for s, g in zip(sums, gradients, strict=True)]
    return total, sums


def array(value: Any) -> np.ndarray:
    known = isinstance(value, (keras.Variable, np.ndarray))
    return np.asarray(ops.convert_to_numpy(value if known else verbs.as_dense(value)))


def _seed(whole: keras.Model, program: Any, place: tuple[int, ...]) -> None:
    """Give each generator of the whole model the state that it has in a pipeline."""
    pairs = zip(program.model._flatten_layers(), whole._flatten_layers(), strict=True)
    own = {id(theirs): ours for theirs, ours in pairs}
    for node, unit in enumerate(program.units):
        drawing = [layer for layer in unit.layers if layer._seed_generators]
        for i, layer in enumerate(drawing):
            own[id(layer)].seed_generator.state.assign([seed_of(*place, node, i + 1, bits=31), 0])
