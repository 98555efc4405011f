"""Adasum over weight updates: every rank steps on its own gradients, then the ranks' updates are combined.

Maleki et al., "Scaling Distributed Training with Adaptive Summation", arXiv 2006.02924.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import horovod.torch as _horovod
import torch
from horovod.torch import ProcessSet, global_process_set
from torch import Tensor

from hvdscale.errors import PlanError
from hvdscale.sync import Reduction
from hvdscale.torch.gradients import launch
from hvdscale.torch.runtime import world
from hvdscale.torch.steps import StepsOnParameters

__all__ = ["DeltaReducer", "check_adasum"]


def check_adasum(process_set: ProcessSet) -> None:
    """Refuse worlds in which Horovod has no Adasum.

    Raises:
        PlanError: a process set, a number of ranks that is not a power of two, or Gloo.
    """
    size = _horovod.size()
    if process_set.process_set_id != global_process_set.process_set_id:
        raise PlanError("op=Adasum combines all ranks; it knows no process sets. Leave process_set out.")
    if size & (size - 1):
        raise PlanError(f"op=Adasum needs 2, 4, 8, ... ranks, this job has {size}. Change -np, or use op=Average.")
    if size > 1 and world().launch.controller == "gloo":
        raise PlanError("op=Adasum needs MPI; this job runs over Gloo. Start it with mpirun, or use op=Average.")


class DeltaReducer(StepsOnParameters):
    """Combines what a step did to the weights: ``w = before + adasum(after - before)``."""

    watches_gradients = False
    busy = False

    def __init__(self, reduction: Reduction, *, compression: Any, process_set: ProcessSet, prefix: str) -> None:
        self.passes = reduction.passes
        self._reduction = reduction
        self._compression = compression
        self._process_set = process_set
        self._prefix = prefix
        self._named: list[tuple[str, Tensor]] = []
        self._before: list[tuple[str, Tensor, Tensor]] = []  # name, parameter, its value before the step

    def add(self, named: Sequence[tuple[str, Tensor]]) -> None:
        self._named += named

    def set_passes(self, passes: int) -> None:
        self.passes = passes

    def synchronize(self) -> None:
        """Nothing to do before the step: gradients stay each rank's own."""

    def new_round(self) -> None:
        """Nothing is kept from step to step."""

    def forget(self) -> None:
        self._before = []

    def before_scaler(self) -> None:
        raise PlanError(
            "op=Adasum keeps each rank's own gradients, so that ranks would skip different steps under "
            "a GradScaler. Use op=Average, or bfloat16, which needs no scaler."
        )

    def step_skipped(self) -> None:
        """No scaler gets so far."""

    def before_step(self) -> None:
        self._before = [(n, p, p.detach().clone()) for n, p in self._named if p.requires_grad]

    @torch.no_grad()
    def after_step(self) -> None:
        before, self._before = self._before, []  # emptied: a second hook of the same step finds nothing to do
        flights = [
            launch(
                [parameter - start],
                self._reduction,
                compression=self._compression,
                process_set=self._process_set,
                name=f"{self._prefix}{name}",
                in_place=True,
            )
            for name, parameter, start in before
        ]
        for (_, parameter, start), finish in zip(before, flights, strict=True):
            parameter.copy_(start.add_(finish()[0]))
