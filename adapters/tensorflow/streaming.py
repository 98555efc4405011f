"""From batches drawn in Python to a ``tf.data`` pipeline whose last stage counts what is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from hvdscale.data import Passes
from hvdscale.tensorflow.arrays import Layout

__all__ = ["counted_pipeline"]


def counted_pipeline(
    passes: Passes,
    fetch: Callable[[Any], Any],
    layout: Layout,
    *,
    workers: int,
    prefetch: int,
    indices: bool,
    taken: Callable[[Any], None],
) -> tf.data.Dataset:
    """Batches of one pass, fetched ahead; ``taken(batch)`` hears of each drawn batch when it is taken.

    The stage that counts stands behind the prefetch and works when, and only when, a consumer asks for a batch: a
    Python loop, ``fit`` or a loop inside a ``tf.function``. So TensorFlow must not put a prefetch of its own there.

    Args:
        fetch: makes a batch of what a pass draws.
        indices: passes draw int64 sample numbers, which are fetched by ``workers`` threads; otherwise lists of
            records, fetched as they are drawn.
    """
    number = tf.TensorSpec((), tf.int64)

    def drawn() -> Iterator[tuple[Any, ...]]:
        for turn, batch in passes.draw():
            yield (np.int64(turn), batch.indices) if indices else (np.int64(turn), *layout.flat(fetch(batch)))

    def count(turn: Any) -> Any:
        taken(passes.deliver(int(turn)))
        return np.int64(0)

    def fetched(turn: tf.Tensor, samples: tf.Tensor) -> tuple[Any, ...]:
        rows = tf.numpy_function(lambda at: tuple(layout.flat(fetch(at))), [samples], layout.types)
        return (turn, *(rows if isinstance(rows, list | tuple) else (rows,)))

    def handed_out(turn: tf.Tensor, *tensors: tf.Tensor) -> Any:
        with tf.control_dependencies([tf.numpy_function(count, [turn], tf.int64)]):
            return layout.packed([tf.identity(tensor) for tensor in tensors])

    if indices:
        samples = tf.data.Dataset.from_generator(drawn, output_signature=(number, tf.TensorSpec((None,), tf.int64)))
        batches = samples.map(fetched, **({"num_parallel_calls": workers, "deterministic": True} if workers else {}))
    else:
        parts = [tf.TensorSpec(spec.shape, spec.dtype) for spec in tf.nest.flatten(layout.signature)]
        batches = tf.data.Dataset.from_generator(drawn, output_signature=(number, *parts))
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    options.experimental_optimization.inject_prefetch = False
    options.experimental_optimization.map_parallelization = False  # a user's map behind this would draw ahead of it
    options.deterministic = True
    if prefetch:
        batches = batches.prefetch(prefetch)
    return batches.map(handed_out).with_options(options)
