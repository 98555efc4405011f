"""Training with rounds on ranks in one process: what the tests of the relaxed family share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hvdscale.runtime.channel import TransportChannel
from hvdscale.runtime.transport import Transport, run_loopback
from hvdscale.sync import Relaxed, Rounds
from tests.core.numpy_store import NumPyStore, NumPyTensors
from tests.core.quadratic import SHAPES, Quadratic, start

LR = 0.1


def node_of(rank: int) -> int:
    """Two ranks a host."""
    return rank // 2


class HostedChannel(TransportChannel):
    """As on real hosts of two ranks each."""

    def host(self) -> float:
        return float(node_of(self.rank))


class Trainer:
    """One rank: its own quadratic, gradient descent with momentum in float32, and the rounds of ``plan``."""

    def __init__(self, plan: Relaxed, transport: Transport, momentum: float = 0.0, dtype: Any = np.float32) -> None:
        self.rank, self._momentum = transport.rank, momentum
        self._transport = transport
        flat, places = start(), np.cumsum([0, 30, 7, 12])
        self.arrays = {
            name: flat[a:b].reshape(shape).astype(dtype)
            for (name, shape), a, b in zip(SHAPES.items(), places, places[1:], strict=False)
        }
        self.velocity = {name: np.zeros(array.shape, np.float32) for name, array in self.arrays.items()}
        self._problem = Quadratic.of(self.rank)
        store = NumPyStore(NumPyTensors(self.arrays), moment=NumPyTensors(self.velocity), rate=LR)
        self.rounds = Rounds(plan, store, HostedChannel(transport))

    def flat(self) -> np.ndarray:
        return np.concatenate([array.ravel() for array in self.arrays.values()]).astype(np.float64)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.rounds.before_step()
            gradient = self._problem.gradient(self.flat())
            if self.rounds.warming_up:
                gradients = [np.frombuffer(g) for g in self._transport.allgather(gradient.tobytes())]
                gradient = np.mean(gradients, axis=0)
            at = 0
            for name, array in self.arrays.items():
                piece = gradient[at : at + array.size].reshape(array.shape)
                at += array.size
                self.velocity[name] *= self._momentum
                self.velocity[name] += piece
                array -= (LR * self.velocity[name]).astype(array.dtype)
            self.rounds.after_step()


def on_ranks(ranks: int, body: Callable[[Transport], Any]) -> list[Any]:
    results = run_loopback(ranks, body)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def train(plan: Relaxed, ranks: int = 3, steps: int = 23, momentum: float = 0.0, flush: bool = True) -> np.ndarray:
    """Weights of every rank, [ranks, 49]."""

    def body(transport: Transport) -> np.ndarray:
        trainer = Trainer(plan, transport, momentum)
        trainer.train(steps)
        if flush:
            trainer.rounds.flush()
        return trainer.flat()

    return np.stack(on_ranks(ranks, body))
