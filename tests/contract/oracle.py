"""The NumPy oracle in float64: a two-layer network, its gradients, and the optimizers, written out plainly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Weights = list[np.ndarray]  # [W1 (d, h), b1 (h,), W2 (h, 1), b2 (1,)]
Batch = tuple[np.ndarray, np.ndarray]  # x (n, d), y (n, 1)

INPUTS, HIDDEN = 3, 5


def initial_weights(seed: int = 0) -> Weights:
    """float64 weights exactly representable in float32."""
    rng = np.random.default_rng(seed)
    shapes = [(INPUTS, HIDDEN), (HIDDEN,), (HIDDEN, 1), (1,)]
    return [rng.normal(size=s).astype(np.float32).astype(np.float64) for s in shapes]


def batches(steps: int, rank: int, size: int = 8, seed: int = 1) -> list[Batch]:
    """The batches of one rank; every rank has others."""
    rng = np.random.default_rng([seed, rank])
    return [
        (
            rng.normal(size=(size, INPUTS)).astype(np.float32).astype(np.float64),
            rng.normal(size=(size, 1)).astype(np.float32).astype(np.float64),
        )
        for _ in range(steps)
    ]


def loss(weights: Weights, batch: Batch) -> float:
    """Mean squared error of ``tanh(x W1 + b1) W2 + b2``."""
    w1, b1, w2, b2 = weights
    x, y = batch
    return float(np.mean((np.tanh(x @ w1 + b1) @ w2 + b2 - y) ** 2))


def gradients(weights: Weights, batch: Batch) -> Weights:
    w1, b1, w2, b2 = weights
    x, y = batch
    hidden = np.tanh(x @ w1 + b1)  # (n, h)
    error = 2 * (hidden @ w2 + b2 - y) / len(x)  # (n, 1)
    inner = error @ w2.T * (1 - hidden**2)  # (n, h)
    return [x.T @ inner, inner.sum(0), hidden.T @ error, error.sum(0)]


def mean_gradients(weights: Weights, batches: Sequence[Batch]) -> Weights:
    """What an averaging all-reduce over ranks with these batches gives."""
    every = [gradients(weights, b) for b in batches]
    return [np.mean(parts, axis=0) for parts in zip(*every, strict=True)]


Update = Callable[[Weights, Weights], Weights]


def sgd(lr: float = 0.1) -> Update:
    return lambda w, g: [a - lr * b for a, b in zip(w, g, strict=True)]


def momentum(lr: float = 0.1, mu: float = 0.9) -> Update:
    velocity: list[Any] = [0.0] * 4

    def update(w: Weights, g: Weights) -> Weights:
        velocity[:] = [mu * v + b for v, b in zip(velocity, g, strict=True)]
        return [a - lr * v for a, v in zip(w, velocity, strict=True)]

    return update


def adam(lr: float = 0.01, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-7) -> Update:
    m: list[Any] = [0.0] * 4
    v: list[Any] = [0.0] * 4
    t = 0

    def update(w: Weights, g: Weights) -> Weights:
        nonlocal t
        t += 1
        m[:] = [b1 * a + (1 - b1) * b for a, b in zip(m, g, strict=True)]
        v[:] = [b2 * a + (1 - b2) * b * b for a, b in zip(v, g, strict=True)]
        scale = lr * np.sqrt(1 - b2**t) / (1 - b1**t)
        return [a - scale * x / (np.sqrt(y) + eps) for a, x, y in zip(w, m, v, strict=True)]

    return update


OPTIMIZERS: dict[str, Callable[[], Update]] = {"sgd": sgd, "momentum": momentum, "adam": adam}
