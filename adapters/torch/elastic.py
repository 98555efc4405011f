"""Elastic training: Horovod's, with state synchronised without a step and a sampler that never runs short."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from horovod.common.elastic import run_fn
from horovod.torch.elastic import ElasticSampler as _ElasticSampler
from horovod.torch.elastic import TorchState as _TorchState
from horovod.torch.elastic.state import ModelStateHandler, OptimizerStateHandler, StateHandler
from torch import nn
from torch.optim import Optimizer

from hvdscale.torch.broadcast import broadcast_optimizer_state, broadcast_parameters
from hvdscale.torch.runtime import init, shutdown

__all__ = ["ElasticSampler", "TorchState", "run"]


def run(func: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``func(state, ...)`` through the coming and going of ranks. See ``horovod.torch.elastic.run``."""
    return run_fn(func, _reset)


def _reset() -> None:
    shutdown()
    init()


class TorchState(_TorchState):
    """State of an elastic job: a model, an optimizer, samplers and plain values. See Horovod's ``TorchState``.

    Plain values travel by pickle: use it among machines you trust.
    """

    def __init__(self, model: nn.Module | None = None, optimizer: Optimizer | None = None, **kwargs: Any) -> None:
        super().__init__(model=model, optimizer=optimizer, **kwargs)
        for name, handler in self._handlers.items():
            self._handlers[name] = _corrected(handler)


class _Model(ModelStateHandler):
    def sync(self) -> None:
        broadcast_parameters(self.value.state_dict(), root_rank=0)
        self.save()  # so that a restore before the first commit does not bring back this rank's own start


class _Optimizer(OptimizerStateHandler):
    def sync(self) -> None:
        broadcast_optimizer_state(self.value, root_rank=0)
        self.save()


def _corrected(handler: StateHandler) -> StateHandler:
    twins: dict[type, type] = {ModelStateHandler: _Model, OptimizerStateHandler: _Optimizer}
    twin = twins.get(type(handler))
    return handler if twin is None else twin(handler.value)


class ElasticSampler(_ElasticSampler):
    """Horovod's ``ElasticSampler``, also when fewer samples remain than half the ranks: they are repeated."""

    def __iter__(self) -> Iterator[int]:
        padded = itertools.islice(itertools.cycle(self.remaining_indices), self.total_size)
        self.indices = list(padded)[self.rank : self.total_size : self.num_replicas]
        return iter(self.indices)
