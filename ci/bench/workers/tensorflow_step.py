"""One rank of the TensorFlow bench: a small Keras GPT under ``tf.function``, joined in the way ``--way`` names."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np
import tensorflow as tf

from ci.bench.workers.ranks import digest, leave_result, median_seconds, meet
from ci.bench.workers.ranks import in_step as ranks_in_step

WIDTH, LAYERS, HEADS, CONTEXT, VOCABULARY, BATCH = 256, 4, 4, 128, 256, 8

Step = Callable[[], Any]


def gpt() -> keras.Model:
    """Bytes in, logits of the next byte out; 3.3 million parameters, as in the torch bench."""
    layers = keras.layers
    ids = keras.Input((CONTEXT,), dtype="int32")  # [batch, context]
    places = layers.Embedding(CONTEXT, WIDTH)(keras.ops.arange(CONTEXT))
    x = layers.Embedding(VOCABULARY, WIDTH)(ids) + places
    for _ in range(LAYERS):
        normed = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(normed, normed, use_causal_mask=True)
        hidden = layers.Dense(4 * WIDTH, activation="gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dense(WIDTH)(hidden)
    logits = layers.Dense(VOCABULARY, use_bias=False)(layers.LayerNormalization()(x))  # [batch, context, vocabulary]
    return keras.Model(ids, logits)


def batch(rank: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Random bytes and, for each, the byte that follows."""
    data = np.random.default_rng(rank).integers(VOCABULARY, size=(BATCH, CONTEXT + 1), dtype=np.int32)
    return tf.constant(data[:, :-1]), tf.constant(data[:, 1:])


def loss_of(model: keras.Model, ids: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    return tf.reduce_mean(
        tf.nn.sparse_softmax_cross_entropy_with_logits(labels=targets, logits=model(ids, training=True))
    )


def plain_step(model: keras.Model, optimizer: Any, ids: tf.Tensor, targets: tf.Tensor) -> Step:
    """A step as a script writes it; what ``optimizer`` does with the gradients is its own business."""

    @tf.function
    def step() -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = loss_of(model, ids, targets)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return loss

    return step


def independent() -> tuple[int, int, keras.Model, Step]:
    rank, ranks = int(os.environ.get("BENCH_RANK", "0")), int(os.environ.get("BENCH_RANKS", "1"))
    model, optimizer = gpt(), keras.optimizers.AdamW(3e-4)
    optimizer.build(model.trainable_variables)
    return rank, ranks, model, plain_step(model, optimizer, *batch(rank))


def strategy() -> tuple[int, int, keras.Model, Step]:
    rank, ranks = int(os.environ["BENCH_RANK"]), int(os.environ["BENCH_RANKS"])
    workers = [f"127.0.0.1:{port}" for port in os.environ["BENCH_PORTS"].split(",")]
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": rank}})
    multi_worker = tf.distribute.MultiWorkerMirroredStrategy()
    ids, targets = batch(rank)
    with multi_worker.scope():
        model, optimizer = gpt(), keras.optimizers.AdamW(3e-4)
        optimizer.build(model.trainable_variables)

    def replica() -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = loss_of(model, ids, targets)
        gradients = tape.gradient(loss, model.trainable_variables)
        # Keras 3 leaves the sum over replicas to its caller; all at once lets TensorFlow pack them.
        context = tf.distribute.get_replica_context()
        optimizer.apply(context.all_reduce(tf.distribute.ReduceOp.MEAN, gradients), model.trainable_variables)
        return loss

    @tf.function
    def step() -> tf.Tensor:
        return multi_worker.run(replica)

    return rank, ranks, model, step


def horovod() -> tuple[int, int, keras.Model, Step]:
    import horovod.tensorflow as hvd

    hvd.init()
    model, optimizer, (ids, targets) = gpt(), keras.optimizers.AdamW(3e-4), batch(hvd.rank())
    optimizer.build(model.trainable_variables)
    hvd.broadcast_variables([v.value for v in (*model.variables, *optimizer.variables)], root_rank=0)

    @tf.function
    def step() -> tf.Tensor:
        # Its DistributedGradientTape fails on Keras 3 variables: this is what it would have done.
        with tf.GradientTape() as tape:
            loss = loss_of(model, ids, targets)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(hvd.grouped_allreduce(gradients, op=hvd.Average), model.trainable_variables)
        return loss

    return hvd.rank(), hvd.size(), model, step


def hvdscale() -> tuple[int, int, keras.Model, Step]:
    import hvdscale.tensorflow as hvd

    hvd.init()
    model, optimizer, (ids, targets) = gpt(), keras.optimizers.AdamW(3e-4), batch(hvd.rank())
    optimizer.build(model.trainable_variables)
    hvd.broadcast_variables([*model.variables, *optimizer.variables], root_rank=0)

    @tf.function
    def step() -> tf.Tensor:
        with hvd.DistributedGradientTape(tf.GradientTape()) as tape:
            loss = loss_of(model, ids, targets)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return loss

    return hvd.rank(), hvd.size(), model, step


def in_step() -> tuple[int, int, keras.Model, Step]:
    rank, ranks, model, step = independent()
    return rank, ranks, model, ranks_in_step(step, rank, ranks)


WAYS = {way.__name__: way for way in (independent, in_step, strategy, horovod, hvdscale)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=WAYS, required=True)
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args()
    keras.utils.set_random_seed(0)
    rank, ranks, model, step = WAYS[options.way]()
    meet(rank, ranks)
    seconds = median_seconds(step, options.steps, warmup=3)
    weights = (
        None if options.way in ("independent", "in_step") else digest(v.numpy() for v in model.trainable_variables)
    )
    leave_result(rank, weights, step=seconds)


if __name__ == "__main__":
    main()
