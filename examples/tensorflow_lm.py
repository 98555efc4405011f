"""The same language model as ``train_lm.py`` in plain TensorFlow, with a loop of its own.

    python examples/tensorflow_lm.py
    horovodrun -np 2 python examples/tensorflow_lm.py
    mpirun -np 2 python examples/tensorflow_lm.py --sync diloco --every 16 --wire int8

Lines that end in ``# hvd`` are all that distributed training needs.
"""

import hvdscale.tensorflow as hvd  # hvd

# isort: split
import numpy as np
import tensorflow as tf
from lm.batches import Share
from lm.flags import parse_flags, process_sets, run
from lm.plans import plan_of
from lm.report import Report
from lm.together import load_together


class Linear(tf.Module):
    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = tf.Variable(tf.random.normal((inputs, outputs), stddev=0.02))
        self.bias = tf.Variable(tf.zeros(outputs), trainable=bias)

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        return x @ self.weight + self.bias


class Norm(tf.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.shift = tf.Variable(tf.ones(width)), tf.Variable(tf.zeros(width))

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        mean, variance = tf.nn.moments(x, -1, keepdims=True)
        return (x - mean) * tf.math.rsqrt(variance + 1e-5) * self.scale + self.shift


class Block(tf.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = Norm(width), Norm(width)
        self.qkv, self.out = Linear(width, 3 * width), Linear(width, width)
        self.up, self.down = Linear(width, 4 * width), Linear(4 * width, width)

    def __call__(self, x: tf.Tensor) -> tf.Tensor:  # [batch, context, width]
        batch, context, width = tf.unstack(tf.shape(x))
        split = tf.reshape(self.qkv(self.norm_1(x)), (batch, context, 3, self.heads, width // self.heads))
        q, k, v = tf.unstack(tf.transpose(split, (2, 0, 3, 1, 4)))  # [batch, heads, context, width / heads]
        scores = tf.matmul(q, k, transpose_b=True) / tf.sqrt(tf.cast(width // self.heads, tf.float32))
        future = tf.linalg.band_part(tf.ones((context, context)), -1, 0) == 0
        y = tf.nn.softmax(tf.where(future, -1e9, scores)) @ v
        x = x + self.out(tf.reshape(tf.transpose(y, (0, 2, 1, 3)), (batch, context, width)))
        return x + self.down(tf.nn.gelu(self.up(self.norm_2(x))))


class LanguageModel(tf.Module):
    """Tokens int32[batch, context] to logits float32[batch, context, vocabulary]."""

    def __init__(self, vocabulary: int, context: int, depth: int, width: int, heads: int) -> None:
        super().__init__()
        self.tokens = tf.Variable(tf.random.normal((vocabulary, width), stddev=0.02))
        self.places = tf.Variable(tf.random.normal((context, width), stddev=0.02))
        self.blocks = [Block(width, heads) for _ in range(depth)]
        self.norm, self.head = Norm(width), Linear(width, vocabulary, bias=False)

    def __call__(self, tokens: tf.Tensor) -> tf.Tensor:
        x = tf.gather(self.tokens, tokens) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    @tf.function
    def loss(self, inputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        """Mean over tokens, in nats."""
        return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(targets, self(inputs)))


def mean_of_ranks(values: np.ndarray) -> np.ndarray:
    return hvd.allreduce(tf.constant(values)).numpy()  # hvd


def evaluate(
    model: LanguageModel, optimizer: tf.keras.optimizers.Optimizer, share: Share, batch_size: int, report: Report
) -> None:
    inputs, targets = share.held_out
    total = 0.0
    with optimizer.sync.evaluating():  # hvd: the weights that all ranks share
        for i in range(0, len(inputs), batch_size):
            piece = targets[i : i + batch_size]
            total += float(model.loss(tf.constant(inputs[i : i + batch_size]), tf.constant(piece))) * piece.size
    report.evaluated(total / max(targets.size, 1), targets.size)


def main() -> None:
    flags = parse_flags(__doc__)
    hvd.init(process_sets=process_sets(flags))  # hvd
    rank, ranks = hvd.rank(), hvd.size()  # hvd
    share = load_together(flags, rank, ranks, mean_of_ranks)

    tf.random.set_seed(flags.seed)
    model = LanguageModel(share.vocabulary, flags.context, flags.layers, flags.width, flags.heads)
    weights = model.trainable_variables
    rate = tf.keras.optimizers.schedules.CosineDecay(
        flags.lr / flags.warmup if flags.warmup else flags.lr,
        decay_steps=flags.steps - flags.warmup,
        alpha=0.1,
        warmup_target=flags.lr if flags.warmup else None,
        warmup_steps=flags.warmup,
    )
    optimizer = tf.keras.optimizers.AdamW(rate, weight_decay=0.01, global_clipnorm=1.0)
    optimizer = hvd.DistributedOptimizer(optimizer, sparse_as_dense=True, sync=plan_of(flags))  # hvd
    optimizer.build(weights)
    hvd.broadcast_variables([*model.variables, *optimizer.variables], root_rank=0)  # hvd

    @tf.function
    def train(inputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = model.loss(inputs, targets)
        optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return loss

    report = Report(rank, ranks, flags.steps, flags.batch_size * flags.context, mean_of_ranks, flags.logdir)
    report.agreement = optimizer.sync.metrics  # hvd
    report.say(f"{ranks} rank{'s' if ranks > 1 else ''} on TensorFlow {tf.__version__}")
    report.say(f"{sum(int(tf.size(w)) for w in weights):,} parameters; {share.description}")
    evaluate(model, optimizer, share, flags.batch_size, report)
    for step in range(flags.steps):
        report.step(float(train(*map(tf.constant, share.batches[step]))))
        if (step + 1) % flags.eval_every == 0 or step + 1 == flags.steps:
            if step + 1 == flags.steps:
                optimizer.sync.flush()  # hvd
            evaluate(model, optimizer, share, flags.batch_size, report)
    report.finish(flags.plot, flags.record)


if __name__ == "__main__":
    run(main)
