"""The relaxed family once more, in float64, all ranks in one loop and nothing shared with the code under test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Gradient = Callable[[Array, int], Array]  # (weights, step from 0) -> gradient


class Momentum:
    """Gradient descent, with heavy-ball momentum where ``mu`` is not 0."""

    def __init__(self, lr: float = 0.1, mu: float = 0.0) -> None:
        self.lr, self.mu = lr, mu
        self.moments: list[Any] = [0.0]

    def step(self, x: Array, g: Array) -> Array:
        self.moments[0] = self.mu * self.moments[0] + g
        return x - self.lr * self.moments[0]


class Adam:
    def __init__(self, lr: float = 0.01, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-7) -> None:
        self.lr, self.b1, self.b2, self.eps = lr, b1, b2, eps
        self.moments: list[Any] = [0.0, 0.0]
        self.t = 0

    def step(self, x: Array, g: Array) -> Array:
        self.t += 1
        m, v = self.moments
        self.moments = [self.b1 * m + (1 - self.b1) * g, self.b2 * v + (1 - self.b2) * g * g]
        m, v = self.moments
        scale = self.lr * np.sqrt(1 - self.b2**self.t) / (1 - self.b1**self.t)
        return x - scale * m / (np.sqrt(v) + self.eps)


def trajectory(
    gradients: Sequence[Gradient],
    start: Array,
    pieces: Sequence[slice],
    steps: int,
    every: int | Callable[[int], int],
    inner: Callable[[], Any] = Momentum,
    *,
    warmup: int = 0,
    outer: tuple[str, float, float] = ("average", 1.0, 0.0),
    overlap: int = 0,
    mixing: float = 1.0,
    average_moments: bool = False,
    nodes: Sequence[Sequence[int]] = (),
    across: int = 1,
    matrix: Callable[[int], Array] | None = None,
    flush: bool = True,
) -> Array:
    """Weights of every rank, [ranks, n], after ``steps`` steps, and a flush if asked for.

    ``every`` is a number of steps, or the length of the period that begins after ``step`` steps.
    ``gradients`` has one function a rank, ``pieces`` the fragments, ``inner`` makes an optimizer for each rank.
    ``nodes`` meet at every round, all ranks at every ``across``-th. With ``matrix``, rank ``i`` takes
    ``matrix(round)[i, j]`` of rank ``j`` instead.
    """
    optimizers = [inner() for _ in gradients]
    x = np.stack([start] * len(gradients))
    anchor, slow = start.copy(), np.zeros_like(start)
    period = every if callable(every) else lambda step: every
    due = [warmup + -(-period(warmup) * (i + 1) // len(pieces)) for i in range(len(pieces))]
    over = [False] * len(pieces)  # a period has just ended
    count = [0] * len(pieces)
    in_flight: list[tuple[int, slice, Array, Array]] = []

    def inside(part: slice) -> None:
        for node in nodes:
            x[list(node), part] = x[list(node), part].mean(axis=0)

    def move(part: slice, mean: Array) -> None:
        kind, rate, beta = outer
        slow[part] = beta * slow[part] + mean
        anchor[part] -= rate * {"average": mean, "slow": slow[part], "nesterov": mean + beta * slow[part]}[kind]

    for step in range(1, steps + 1):
        g = np.stack([gradient(x[r], step - 1) for r, gradient in enumerate(gradients)])
        if step <= warmup:
            g[:] = g.mean(axis=0)
        x = np.stack([optimizer.step(x[r], g[r]) for r, optimizer in enumerate(optimizers)])
        if step <= warmup:
            anchor = x[0].copy()
            continue
        for landing in [flight for flight in in_flight if flight[0] == step]:
            in_flight.remove(landing)
            _, part, sent, mean = landing
            if matrix is not None:
                x[:, part] += mixing * (mean - sent)
                continue
            move(part, mean)
            x[:, part] += mixing * (anchor[part] - sent)
        for i, part in enumerate(pieces):
            over[i] = False
            if step == due[i]:
                due[i] += period(step)
                inside(part)
                count[i] += 1
                if count[i] % across:
                    continue
                over[i] = True
                sent = x[:, part].copy()
                if matrix is not None:
                    mean = matrix(count[i] - 1) @ sent
                    if overlap:
                        in_flight.append((step + overlap, part, sent, mean))
                    else:
                        x[:, part] += mixing * (mean - sent)
                    continue
                mean = (anchor[part] - sent).mean(axis=0)
                if overlap:
                    in_flight.append((step + overlap, part, sent, mean))
                else:
                    move(part, mean)
                    x[:, part] += mixing * (anchor[part] - sent)
                if average_moments:
                    for moment in range(len(optimizers[0].moments)):
                        together = np.mean([o.moments[moment][part] for o in optimizers], axis=0)
                        for optimizer in optimizers:
                            optimizer.moments[moment][part] = together
    if flush and matrix is not None:
        for _, part, sent, mean in in_flight:
            x[:, part] += mixing * (mean - sent)
        x[:] = x.mean(axis=0)
    elif flush and steps > warmup:
        for _, part, sent, mean in in_flight:
            move(part, mean)
            x[:, part] += mixing * (anchor[part] - sent)
        for i, part in enumerate(pieces):
            if not over[i]:
                move(part, (anchor[part] - x[:, part]).mean(axis=0))
            x[:, part] = anchor[part]
    return x
