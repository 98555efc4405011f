"""The relaxed family once more, in float64, all ranks in one loop and nothing shared with the code under test.

Each rank minimises ``0.5 * |A_r x - b_r|**2`` over its own ``A_r`` and ``b_r`` by gradient descent with momentum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

SHAPES = {"w": (6, 5), "b": (7,), "v": (4, 3)}
SIZE = 49


@dataclass
class Quadratic:
    """One rank's problem. ``gradient`` is float64[49] at float64[49]."""

    a: Array
    b: Array

    @classmethod
    def of(cls, rank: int) -> Quadratic:
        rng = np.random.default_rng([7, rank])
        return cls(rng.normal(size=(SIZE, SIZE)) / SIZE**0.5, rng.normal(size=SIZE))

    def gradient(self, x: Array) -> Array:
        return self.a.T @ (self.a @ x - self.b)


def start() -> Array:
    return np.random.default_rng(3).normal(size=SIZE)


def pieces(fragments: int) -> list[slice]:
    """The tensors w (30), b (7), v (12), cut where the fragments of the code under test are cut."""
    return {1: [slice(0, 49)], 2: [slice(0, 30), slice(30, 49)], 3: [slice(0, 30), slice(30, 37), slice(37, 49)]}[
        fragments
    ]


def trajectory(
    ranks: int,
    steps: int,
    every: int,
    *,
    lr: float = 0.1,
    momentum: float = 0.0,
    warmup: int = 0,
    outer: tuple[str, float, float] = ("average", 1.0, 0.0),
    fragments: int = 1,
    overlap: int = 0,
    mixing: float = 1.0,
    average_momentum: bool = False,
    flush: bool = True,
) -> tuple[Array, Array]:
    """``(weights of every rank [ranks, 49], anchor [49])`` after ``steps`` steps and a flush."""
    problems = [Quadratic.of(r) for r in range(ranks)]
    x = np.stack([start()] * ranks)
    u = np.zeros_like(x)  # the inner momentum
    anchor, slow = start(), np.zeros(SIZE)
    parts = pieces(fragments)
    first = [warmup + -(-every * (i + 1) // fragments) for i in range(fragments)]
    in_flight: list[tuple[int, slice, Array, Array]] = []

    def move(part: slice, mean: Array) -> None:
        kind, rate, beta = outer
        slow[part] = beta * slow[part] + mean
        change = {"average": mean, "slow": slow[part], "nesterov": mean + beta * slow[part]}[kind]
        anchor[part] -= rate * change

    for step in range(1, steps + 1):
        gradients = np.stack([p.gradient(x[r]) for r, p in enumerate(problems)])
        if step <= warmup:
            gradients[:] = gradients.mean(axis=0)
        u = momentum * u + gradients
        x = x - lr * u
        if step <= warmup:
            anchor = x[0].copy()
            continue
        for landing in [flight for flight in in_flight if flight[0] == step]:
            in_flight.remove(landing)
            _, part, sent, mean = landing
            move(part, mean)
            x[:, part] += mixing * (anchor[part] - sent)
        for i, part in enumerate(parts):
            if step >= first[i] and (step - first[i]) % every == 0:
                sent = x[:, part].copy()
                in_flight.append((step + overlap, part, sent, (anchor[part] - sent).mean(axis=0)))
                if overlap == 0:
                    _, _, _, mean = in_flight.pop()
                    move(part, mean)
                    x[:, part] += mixing * (anchor[part] - x[:, part])
                if average_momentum:
                    u[:] = u.mean(axis=0)
    if flush and steps > warmup:
        for _, part, sent, mean in in_flight:
            move(part, mean)
            x[:, part] += mixing * (anchor[part] - sent)
        for i, part in enumerate(parts):
            if steps < first[i] or (steps - first[i]) % every or overlap:
                move(part, (anchor[part] - x[:, part]).mean(axis=0))
            x[:, part] = anchor[part]
    return x, anchor
