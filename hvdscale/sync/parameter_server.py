"""Asynchronous aggregation: workers push what they changed and pull the shared weights, and do not wait for each other.

Ho et al., "More effective distributed ML via a stale synchronous parallel parameter server", NIPS 2013; Li et al.,
"Scaling distributed machine learning with the parameter server", OSDI 2014; Dean et al., "Large scale distributed deep
networks", NIPS 2012. The momentum of the server: ``hvdscale.update.DelayedNesterov``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from hvdscale.errors import PlanError
from hvdscale.sync.local_plan import LocalPlan, check_whole
from hvdscale.update import DelayedNesterov
from hvdscale.update.outer import check_number

__all__ = ["OnFailure", "ParameterServer"]

OnFailure = Literal["stop", "continue"]


@dataclass(frozen=True)
class ParameterServer(LocalPlan):
    """After every ``every`` steps a worker pushes its change of the weights to the servers, and pulls theirs.

    A push counts as the worker's part of the workers' mean. No worker begins a step while it has made more than
    ``staleness`` pushes more than the slowest that still trains.

    Args:
        staleness: how many pushes the fastest worker may be ahead. 0: all wait for each other, which is the same as
            ``LocalSGD(every)``, and with plain or momentum SGD and ``every=1`` as ``EveryStep()``. ``None``: nobody
            waits.
        servers: on how many ranks the shared weights lie, an equal part on each; left out: on all, or on one where
            they are set aside.
        dedicated: the servers are the last ranks, set aside: they do not train. Otherwise they are the first ranks,
            and serve from a thread beside their training.
        every: steps between pushes.
        outer_lr: what a push is multiplied by.
        outer_momentum: Nesterov momentum at the servers, once in as many pushes as there are workers, in 0 .. 1.
        on_failure: when a worker stops or dies: ``"stop"`` ends the job, naming it; ``"continue"`` goes on without
            it, as long as it held no part of the shared weights.
        patience_seconds: a rank that was not heard of for so long counts as gone.

    Raises:
        PlanError: a value that cannot be, or two that do not go together.
    """

    staleness: int | None
    servers: int | None = field(default=None, kw_only=True)
    dedicated: bool = field(default=False, kw_only=True)
    every: int = field(default=1, kw_only=True)
    outer_lr: float = field(default=1.0, kw_only=True)
    outer_momentum: float = field(default=0.0, kw_only=True)
    on_failure: OnFailure = field(default="stop", kw_only=True)
    patience_seconds: float = field(default=30.0, kw_only=True)

    def __post_init__(self) -> None:
        if self.staleness is not None:
            check_whole("staleness (pushes the fastest worker may be ahead; None for no bound)", self.staleness, 0)
        if self.servers is not None:
            check_whole("servers", self.servers, 1)
        check_whole("every", self.every, 1)
        check_whole("warmup", self.warmup, 0)
        check_number("patience_seconds", self.patience_seconds, 1.0)
        if not isinstance(self.dedicated, bool):
            raise PlanError(f"dedicated is True or False; it is {self.dedicated!r}.")
        if self.on_failure not in get_args(OnFailure):
            raise PlanError(f'on_failure is "stop" or "continue"; it is {self.on_failure!r}.')
        if self.dedicated and self.warmup:
            raise PlanError(
                f"In warmup={self.warmup} steps every rank averages gradients, and ranks set aside have none. "
                "Leave warmup out, or dedicated."
            )
        self.outer_optimizer()

    def outer_optimizer(self) -> DelayedNesterov:
        """How the shared weights move by a push."""
        return DelayedNesterov(self.outer_lr, self.outer_momentum)

    def server_ranks(self, ranks: int) -> range:
        """Positions of the ranks that hold the shared weights, among ``ranks``.

        Raises:
            PlanError: more servers than ranks, or no rank left to train.
        """
        count = self.servers or (1 if self.dedicated else ranks)
        if count > ranks:
            raise PlanError(
                f"Shared weights lie on as many ranks as there are at most: servers={count}, and {ranks} "
                f"rank{'s' * (ranks > 1)}. Use servers={ranks} or fewer, or leave it out."
            )
        if self.dedicated and count == ranks:
            raise PlanError(
                f"servers={count} of {ranks} rank{'s' * (ranks > 1)} are set aside, and none is left to train. Use "
                "fewer servers or more ranks, or leave dedicated out: servers then train too."
            )
        return range(ranks - count, ranks) if self.dedicated else range(count)

    def set_aside(self, rank: int) -> PlanError:
        """What a rank is told that serves, and makes a step."""
        error: PlanError = PlanError(
            f"rank {rank} is set aside as a server and does not train. Where optimizer.sync.trains is False call "
            "optimizer.sync.flush(), which serves until the others are done."
        )
        return error

    def worker_ranks(self, ranks: int) -> range:
        """Positions of the ranks that train, among ``ranks``: what to share the data over.

        Raises:
            PlanError: as ``server_ranks``.
        """
        servers = self.server_ranks(ranks)
        return range(servers.start) if self.dedicated else range(ranks)
