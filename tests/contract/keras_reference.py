"""Plain Keras as the reference: N ranks with batch B must equal one process with all their batches in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

import hvdscale.keras as hvd
from tests.contract import oracle
from tests.contract.oracle import HIDDEN, INPUTS, Batch, Weights

BACKEND = keras.backend.backend()


def network(weights: Weights | None = None, dtype: str | None = None) -> Any:
    """The oracle's network; without weights, with other ones on every rank."""
    model = keras.Sequential(
        [
            keras.Input((INPUTS,)),
            keras.layers.Dense(HIDDEN, activation="tanh", dtype=dtype),
            keras.layers.Dense(1, dtype=dtype),
        ]
    )
    chosen = oracle.initial_weights(100 + hvd.rank()) if weights is None else weights
    model.set_weights([w.astype(np.float32) for w in chosen])
    return model


def own_batches(steps: int, size: int = 8) -> list[Batch]:
    return [_float32(b) for b in oracle.batches(steps, hvd.rank(), size)]


def all_batches(steps: int, ranks: Sequence[int] | None = None, size: int = 8) -> list[Batch]:
    """Step by step, the batches of all ranks joined into one."""
    every = [oracle.batches(steps, rank, size) for rank in (range(hvd.size()) if ranks is None else ranks)]
    return [
        _float32((np.concatenate([b[0] for b in step]), np.concatenate([b[1] for b in step])))
        for step in zip(*every, strict=True)
    ]


def fit(model: Any, optimizer: Any, batches: Sequence[Batch], **compile_arguments: Any) -> Any:
    """Train with ``model.fit``, one step a batch, in order; returns the history."""
    if getattr(model, "optimizer", None) is None:
        model.compile(optimizer, keras.losses.MeanSquaredError(), **compile_arguments)
    return model.fit(**one_a_step(batches), verbose=0)


def one_a_step(batches: Sequence[Batch]) -> dict[str, Any]:
    """The data that ``fit`` is given to train on equal batches in order, one a step.

    Of arrays and of generators TensorFlow makes a pipeline of functions, traced anew in every ``fit``; that takes as
    long as the few steps do. Of batches that lie ready it makes none.
    """
    if BACKEND == "tensorflow":
        import tensorflow as tf

        x, y = (np.stack(parts) for parts in zip(*batches, strict=True))
        return {"x": tf.data.Dataset.from_tensor_slices((x, y)), "shuffle": False}
    x, y = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return {"x": x, "y": y, "batch_size": len(batches[0][0]), "shuffle": False}


def plain_weights(optimizer: Any, batches: Sequence[Batch], start: Weights) -> Weights:
    """Where plain Keras ends."""
    model = network(start)
    # Built first: inside a compiled step, optimizers that start from the weights would start from zeros.
    optimizer.build(model.trainable_variables)
    fit(model, optimizer, batches, run_eagerly=True)  # no graph to trace for a few steps
    return weights_of(model)


def weights_of(model: Any) -> Weights:
    return [np.asarray(w, np.float64) for w in model.get_weights()]


def gradients(model: Any, batch: Batch) -> list[Any]:
    """The gradients of one batch in a loop of the user's own."""
    loss = keras.losses.MeanSquaredError()
    x, y = batch
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        result: list[Any] = tape.gradient(value, model.trainable_variables)
        return result
    model.zero_grad()
    loss(keras.ops.convert_to_tensor(y), model(keras.ops.convert_to_tensor(x), training=True)).backward()
    return [v.value.grad for v in model.trainable_variables]


def assert_close(actual: Weights, expected: Weights, tolerance: float = 2e-5) -> None:
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def assert_equal_everywhere(values: Sequence[Any]) -> None:
    """The same numbers on every rank, to the last bit."""
    everyone = _everywhere(values)
    for theirs in everyone[1:]:
        np.testing.assert_array_equal(everyone[0], theirs)


def assert_differs_somewhere(values: Sequence[Any]) -> None:
    everyone = _everywhere(values)
    assert hvd.size() == 1 or any(not np.array_equal(everyone[0], theirs) for theirs in everyone)


def _everywhere(values: Sequence[Any]) -> list[np.ndarray]:
    own = np.concatenate([np.ravel(keras.ops.convert_to_numpy(v)).astype(np.float64) for v in values])
    return [np.frombuffer(data) for data in hvd.world().transport.allgather(own.tobytes())]


def _float32(batch: Batch) -> Batch:
    return batch[0].astype(np.float32), batch[1].astype(np.float32)


def small_batches(batches: Sequence[Batch]) -> list[Batch]:
    """A tenth of their values: at the first loss scale nothing overflows in half precision but what is planted."""
    return [(np.float32(0.1) * x, np.float32(0.1) * y) for x, y in batches]
