"""The network in TensorFlow: Keras layers and optimizers in a native loop around ``DistributedGradientTape``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import hvdscale.tensorflow as hvd
from hvdscale.sync import EveryStep, LocalPlan, Reduction
from tests.contract.driver import ContractDriver
from tests.contract.oracle import HIDDEN, INPUTS, Batch, Weights

_OPTIMIZERS: dict[str, Callable[[], keras.optimizers.Optimizer]] = {
    "sgd": lambda: keras.optimizers.SGD(0.1),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01, beta_1=0.9, beta_2=0.999, epsilon=1e-7),
    "adamw": lambda: keras.optimizers.AdamW(0.01, epsilon=1e-3, weight_decay=0.1, global_clipnorm=0.5),
    "adafactor": lambda: keras.optimizers.Adafactor(0.01),
}


@dataclass(eq=False)
class Distributed:
    """A Keras optimizer, and what is done to a tape before its gradients are taken."""

    optimizer: keras.optimizers.Optimizer
    wrap: Callable[[tf.GradientTape], tf.GradientTape]
    compiled: Any = None
    """The step as a ``tf.function``, once there was one: kept, as a script keeps its own."""

    @property
    def sync(self) -> Any:
        return self.optimizer.sync


class Driver(ContractDriver):
    hvd = hvd

    def tensor(self, array: np.ndarray) -> tf.Tensor:
        return tf.constant(array)

    def numpy(self, tensor: Any) -> np.ndarray:
        return np.asarray(tf.convert_to_tensor(tensor))

    def model(self, weights: Weights) -> keras.Model:
        layers = [keras.layers.Dense(HIDDEN, activation="tanh"), keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input((INPUTS,)), *layers])
        model.set_weights(weights)
        return model

    def parameters(self, model: Any) -> list[Any]:
        return list(model.trainable_variables)

    def optimizer(self, kind: str, model: Any) -> keras.optimizers.Optimizer:
        return _OPTIMIZERS[kind]()

    def distribute(self, optimizer: Any, model: Any, **arguments: Any) -> Distributed:
        plan = arguments.get("sync")
        coded = isinstance(plan, EveryStep) and plan.coded
        if coded:
            arguments.pop("backward_passes_per_step", 1)  # the loop adds up: see ``step``
        if coded or isinstance(plan, LocalPlan) or (isinstance(plan, EveryStep) and plan.placed):
            # What outlives a step belongs to the optimizer: rounds, updated weights, what coding lost.
            return Distributed(hvd.DistributedOptimizer(optimizer, model=model, **arguments), lambda tape: tape)
        Reduction(passes=arguments.pop("backward_passes_per_step", 1))  # likewise
        before = optimizer.wrap if isinstance(optimizer, Distributed) else lambda tape: tape

        def wrap(tape: tf.GradientTape) -> tf.GradientTape:
            return hvd.DistributedGradientTape(before(tape), **arguments)

        wrap(tf.GradientTape())  # what cannot be is refused now
        optimizer.build(model.trainable_variables)
        hvd.broadcast_variables([model.variables, optimizer.variables], root_rank=0)
        return Distributed(optimizer, wrap)

    def train(self, model: Any, optimizer: Distributed, batches: Sequence[Batch], passes: int = 1) -> None:
        if optimizer.compiled is None:
            optimizer.compiled = tf.function(self.step, reduce_retracing=True)
        for first in range(0, len(batches), passes):
            chunk = [(tf.cast(x, tf.float32), tf.cast(y, tf.float32)) for x, y in batches[first : first + passes]]
            optimizer.compiled(model, optimizer, chunk)

    def step(self, model: Any, optimizer: Distributed, chunk: Sequence[tuple[tf.Tensor, tf.Tensor]]) -> None:
        """Gradients of the summed losses of ``chunk``, reduced over ranks and applied."""
        with tf.GradientTape() as tape:
            loss = tf.add_n([tf.reduce_mean((model(x) - y) ** 2) for x, y in chunk])
        gradients = optimizer.wrap(tape).gradient(loss, model.trainable_variables)
        optimizer.optimizer.apply(gradients, model.trainable_variables)

    def weights(self, model: Any) -> Weights:
        return [np.asarray(w, np.float64) for w in model.get_weights()]

    def set_weights(self, model: Any, weights: Weights) -> None:
        model.set_weights(weights)
