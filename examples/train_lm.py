"""Train a language model on text: one script for both frameworks, on one process or many ranks.

    python examples/train_lm.py
    KERAS_BACKEND=tensorflow horovodrun -np 2 python examples/train_lm.py
    KERAS_BACKEND=torch mpirun -np 2 python examples/train_lm.py --logdir runs/lm --plot loss.png
    KERAS_BACKEND=torch mpirun -np 2 python examples/train_lm.py --sync local-sgd --every 32 --wire int8
    KERAS_BACKEND=tensorflow mpirun -np 2 python examples/train_lm.py --tp 2
    KERAS_BACKEND=tensorflow mpirun -np 4 python examples/train_lm.py --dp 2 --pp 2 --microbatches 8

The model is a decoder-only transformer in Keras 3. Without ``--data`` it reads the source of Python's own library.
Lines that end in ``# hvd`` are all that distributed training needs.
"""

import hvdscale.keras as hvd  # hvd

# isort: split
import argparse

import keras
import numpy as np
from keras import layers, ops
from lm.batches import Batches, Share
from lm.flags import parse_flags, process_sets, run
from lm.mesh import add_mesh_flags, add_pipeline_flags, mesh_of, pipeline_of
from lm.plans import plan_of
from lm.report import Report
from lm.together import load_together


class Embed(layers.Layer):
    """Token and position vectors: int32[batch, context] to float32[batch, context, width].

    Rows are picked by a product. ``layers.Embedding`` has a sparse gradient in TensorFlow alone, where Keras squares
    each slice of it for Adam before it adds them: the two frameworks would take different steps.
    """

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self._shape = (vocabulary, width)

    def build(self, shape: tuple[int, int]) -> None:
        vocabulary, width = self._shape
        self.tokens = self.add_weight((vocabulary, width), name="embeddings")
        self.places = self.add_weight((shape[1], width), name="positions")

    def call(self, tokens: keras.KerasTensor) -> keras.KerasTensor:
        return ops.matmul(ops.one_hot(tokens, self._shape[0]), self.tokens) + self.places


def build_model(vocabulary: int, context: int, depth: int, width: int, heads: int, seed: int) -> keras.Model:
    """Tokens int32[batch, context] to logits float32[batch, context, vocabulary]."""
    tokens = keras.Input((context,), dtype="int32")
    x = Embed(vocabulary, width)(tokens)
    for _ in range(depth):
        y = layers.LayerNormalization(epsilon=1e-5)(x)
        x = x + layers.MultiHeadAttention(heads, width // heads)(y, y, use_causal_mask=True)
        y = layers.LayerNormalization(epsilon=1e-5)(x)
        x = x + layers.Dense(width)(layers.Dense(4 * width, activation="gelu")(y))
    logits = layers.Dense(vocabulary, use_bias=False)(layers.LayerNormalization(epsilon=1e-5)(x))
    model = keras.Model(tokens, logits)
    # Drawn by NumPy: the same first weights in every framework.
    draw = np.random.default_rng(seed)
    for weight in model.trainable_weights:
        if weight.name in ("kernel", "embeddings", "positions"):
            weight.assign(draw.normal(0, 0.02, weight.shape).astype("float32"))
    return model


class Steps(keras.utils.PyDataset):
    """Batches of steps ``first .. first + count - 1``."""

    def __init__(self, batches: Batches, first: int, count: int) -> None:
        super().__init__()
        self._batches, self._first, self._count = batches, first, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return self._batches[self._first + i]


class Losses(keras.callbacks.Callback):
    """Reports each step's own loss, where Keras reports the mean since the epoch began."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self._report = report

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        self.model.reset_metrics()

    def on_train_batch_end(self, batch: int, logs: dict) -> None:
        self._report.step(logs["loss"])


def mean_of_ranks(values: np.ndarray) -> np.ndarray:
    return np.asarray(hvd.allreduce(values))  # hvd


def evaluate(model: keras.Model, share: Share, batch_size: int, report: Report) -> None:
    inputs, targets = share.held_out
    with model.optimizer.sync.evaluating():  # hvd: the weights that all ranks share
        loss = model.evaluate(inputs, targets, batch_size=batch_size, verbose=0) if len(inputs) else 0.0
    report.evaluated(loss, targets.size)


def sharding_flags(parser: argparse.ArgumentParser) -> None:
    add_mesh_flags(parser)
    add_pipeline_flags(parser)


def shard(model: keras.Model, mesh: hvd.Mesh, loss: keras.losses.Loss, flags: argparse.Namespace) -> hvd.ShardedModel:
    if mesh.pp > 1:
        return hvd.shard_model(model, mesh, loss=loss, **pipeline_of(flags))
    return hvd.shard_model(model, mesh, by="features")


def main() -> None:
    flags = parse_flags(__doc__, extend=sharding_flags)
    hvd.init(process_sets=process_sets(flags))  # hvd
    rank, ranks = hvd.rank(), hvd.size()  # hvd
    mesh = mesh_of(flags, ranks)
    share = load_together(flags, mesh.coordinates(rank).dp, mesh.dp, mean_of_ranks)

    model = build_model(share.vocabulary, flags.context, flags.layers, flags.width, flags.heads, flags.seed)
    parameters = model.count_params()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    held = shard(model, mesh, loss, flags) if mesh.dp < ranks else model  # hvd
    model = held.model if mesh.pp > 1 else model  # hvd: this rank's layers
    rate = keras.optimizers.schedules.CosineDecay(
        flags.lr / flags.warmup if flags.warmup else flags.lr,
        decay_steps=flags.steps - flags.warmup,
        alpha=0.1,
        warmup_target=flags.lr if flags.warmup else None,
        warmup_steps=flags.warmup,
    )
    optimizer = keras.optimizers.AdamW(rate, weight_decay=0.01, global_clipnorm=1.0)
    optimizer = hvd.DistributedOptimizer(optimizer, model=held, sync=plan_of(flags))  # hvd
    model.compile(optimizer, loss)

    tokens = flags.batch_size * flags.context // (mesh.pp * mesh.tp)
    report = Report(rank, ranks, flags.steps, tokens, mean_of_ranks, flags.logdir)
    report.agreement = optimizer.sync.metrics  # hvd
    report.say(f"{ranks} rank{'s' if ranks > 1 else ''} on Keras {keras.__version__} with {keras.backend.backend()}")
    report.say(f"{parameters:,} parameters; {share.description}")
    evaluate(model, share, flags.batch_size, report)
    for first in range(0, flags.steps, flags.eval_every):
        count = min(flags.eval_every, flags.steps - first)
        steps = Steps(share.batches, first, count)
        model.fit(steps, shuffle=False, verbose=0, callbacks=[Losses(report)])
        if first + count == flags.steps:
            optimizer.sync.flush()  # hvd
        evaluate(model, share, flags.batch_size, report)
    report.finish(flags.plot, flags.record)


if __name__ == "__main__":
    run(main)
