"""The contract in Keras 3, trained through ``fit``; KERAS_BACKEND picks the backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

import hvdscale.keras as hvd
from tests.contract.driver import ContractDriver
from tests.contract.keras_reference import one_a_step
from tests.contract.oracle import HIDDEN, INPUTS, Batch, Weights


class Driver(ContractDriver):
    hvd = hvd

    def tensor(self, array: np.ndarray) -> Any:
        return keras.ops.convert_to_tensor(array, dtype=str(array.dtype))

    def numpy(self, tensor: Any) -> np.ndarray:
        return np.asarray(keras.ops.convert_to_numpy(tensor))

    def model(self, weights: Weights) -> Any:
        model = keras.Sequential(
            [
                keras.Input((INPUTS,)),
                keras.layers.Dense(HIDDEN, activation="tanh"),
                keras.layers.Dense(1),
            ]
        )
        model.set_weights([w.astype(np.float32) for w in weights])
        return model

    def parameters(self, model: Any) -> list[Any]:
        return list(model.trainable_variables)

    def optimizer(self, kind: str, model: Any) -> Any:
        make = {
            "sgd": lambda: keras.optimizers.SGD(0.1),
            "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
            "adam": lambda: keras.optimizers.Adam(0.01),
            "adamw": lambda: keras.optimizers.AdamW(0.01, epsilon=1e-3, weight_decay=0.1, global_clipnorm=0.5),
            "adafactor": lambda: keras.optimizers.Adafactor(0.01),
        }
        optimizer = make[kind]()
        if kind == "adamw":
            optimizer.exclude_from_weight_decay(var_names=["bias"])
        return optimizer

    def distribute(self, optimizer: Any, model: Any, **arguments: Any) -> Any:
        return hvd.DistributedOptimizer(optimizer, model=model, **arguments)

    def train(self, model: Any, optimizer: Any, batches: Sequence[Batch], passes: int = 1) -> None:
        if getattr(model, "optimizer", None) is not optimizer:
            model.compile(optimizer, "mse")
        model.fit(**one_a_step([(x.astype(np.float32), y.astype(np.float32)) for x, y in batches]), verbose=0)

    def weights(self, model: Any) -> Weights:
        return [np.asarray(w, np.float64) for w in model.get_weights()]

    def set_weights(self, model: Any, weights: Weights) -> None:
        model.set_weights([w.astype(np.float32) for w in weights])
