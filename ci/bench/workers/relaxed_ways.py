"""Ways to keep the ranks of a torch training together: plans of ours by their name, and the framework's own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer

from ci.bench.relaxed_plans import DDP, INDEPENDENT, PLANS, POST_LOCAL
from ci.bench.workers.torch_step import GPT

__all__ = ["Trainer", "first_model", "join"]


@dataclass
class Trainer:
    """A rank's training as its way hands it back.

    ``mean`` averages a float64 tensor over the ranks; inside ``evaluating()`` the model holds the weights to judge;
    ``flush()`` finishes a period; ``metrics()`` are those of ``optimizer.sync``.
    """

    rank: int
    ranks: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    mean: Callable[[torch.Tensor], torch.Tensor]
    evaluating: Callable[[], AbstractContextManager[None]] = nullcontext
    flush: Callable[[], None] = lambda: None
    metrics: Callable[[], dict[str, float]] = dict
    period: int = 1  # steps between rounds
    overlap: int = 0  # steps a round travels while training goes on

    def step(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        """Train once on int[batch, context] each; the loss."""
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(inputs).flatten(0, 1), targets.long().flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()


def first_model(**sizes: int) -> GPT:
    """The same small weights on every rank; ``sizes`` as ``GPT`` takes them."""
    torch.manual_seed(0)
    model = GPT(**sizes)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(weight)
    return model


def join(way: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> Trainer:
    """``way`` as ``relaxed_plans`` names it. The ranks were started by mpirun, whatever they talk through."""
    if way in PLANS:
        return _ours(way, model, optimizer)
    rank, ranks = int(os.environ["OMPI_COMM_WORLD_RANK"]), int(os.environ["OMPI_COMM_WORLD_SIZE"])
    if way == INDEPENDENT:
        return Trainer(rank, ranks, model, optimizer, lambda values: values)
    if way not in (DDP, POST_LOCAL):
        raise ValueError(f"Unknown way {way!r}; known are {INDEPENDENT!r}, {DDP!r}, {POST_LOCAL!r}, {sorted(PLANS)}.")
    store = f"file://{os.environ['BENCH_FOLDER']}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    joined = nn.parallel.DistributedDataParallel(model)
    evaluating: Callable[[], AbstractContextManager[None]] = nullcontext
    if way == POST_LOCAL:  # no all-reduce of gradients from the first step on, weights averaged every 8 steps
        state = PostLocalSGDState(None, None, start_localSGD_iter=0, post_local_gradient_allreduce=False)
        joined.register_comm_hook(state, post_localSGD_hook)
        optimizer = PostLocalSGDOptimizer(optimizer, PeriodicModelAverager(period=8))

        def evaluating() -> AbstractContextManager[None]:
            return _mean_weights(model)

    return Trainer(rank, ranks, joined, optimizer, _mean_over_gloo, evaluating)


def _ours(way: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> Trainer:
    import hvdscale.torch as hvd

    hvd.init()
    plan = PLANS[way]
    optimizer = hvd.DistributedOptimizer(optimizer, model=model, sync=plan)
    sync, every = optimizer.sync, getattr(plan, "every", 1)
    return Trainer(
        *(hvd.rank(), hvd.size(), model, optimizer, hvd.allreduce),
        *(sync.evaluating, sync.flush, sync.metrics, every if isinstance(every, int) else 1),
        getattr(plan, "overlap", 0),
    )


@contextmanager
def _mean_weights(model: nn.Module) -> Iterator[None]:
    """Inside, the model holds the mean of all ranks' weights."""
    own = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.data.copy_(_mean_over_gloo(parameter.data))
    try:
        yield
    finally:
        for parameter, weights in zip(model.parameters(), own, strict=True):
            parameter.data.copy_(weights)


def _mean_over_gloo(values: torch.Tensor) -> torch.Tensor:
    total = values.clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()
