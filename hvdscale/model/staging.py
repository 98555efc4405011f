"""How a model is to be cut into stages and run, and that all ranks ask for the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hvdscale.errors import PlanError
from hvdscale.model.graph import Graph
from hvdscale.model.mesh import Mesh
from hvdscale.model.partition import Objective
from hvdscale.model.pipeline import INPUT, Pipeline, plan_pipeline
from hvdscale.model.survey import Reading
from hvdscale.runtime.transport import Transport

__all__ = ["Staging", "refuse_together"]


@dataclass(frozen=True)
class Staging:
    """What ``shard_model`` was asked for; see there for what each means."""

    microbatches: int = 1
    schedule: str = "1f1b"
    chunks: int = 1
    recompute: bool = False
    balance: Objective | None = None
    sample: Any = None
    memory_cap: float | None = None
    whole: Sequence[type[Any] | str] = ()
    ties: Sequence[Sequence[str]] = ()
    count: Callable[[Any], Any] | None = None
    seed: int | None = None

    def check(self, mesh: Mesh, loss: Any, means: Sequence[str], splits: bool = False) -> None:
        """Refuse what cannot be, on this rank.

        Args:
            means: what the framework calls the reduction of a loss that is a mean.
            splits: whether layers of stages can be split over tensor ranks.

        Raises:
            PlanError: split features, no loss or one that is a sum, or a balance that nothing was given to measure by.
        """
        if mesh.tp > 1 and not splits:
            raise PlanError(
                f"These stages are of whole layers, and the mesh has tp={mesh.tp}. Use tp=1, or by='layers', which "
                "splits the layers of stages over tp ranks, too."
            )
        if not callable(loss):
            raise PlanError(
                "A pipeline ends in its loss: give loss=..., a function of the model's output and the target."
            )
        reduction = getattr(loss, "reduction", means[0])
        if reduction not in means:
            raise PlanError(
                f"loss must be a mean over samples, so that those of micro-batches add up; its reduction is "
                f"{reduction!r}. Use reduction={means[0]!r}."
            )
        if self.balance in ("time", "memory") and self.sample is None:
            raise PlanError(f"balance={self.balance!r} is measured: give sample=..., a batch of the model's input.")

    def facts(self, mesh: Mesh, by: str, layers: Sequence[str], shared: Sequence[str]) -> dict[str, object]:
        """What all ranks must agree on."""
        return {
            "mesh": mesh,
            "sharded": f"by {by}, {self.schedule}, {self.microbatches} micro-batches, {self.chunks} stages a rank",
            "cut": f"{self.balance}, recompute={self.recompute}, memory_cap={self.memory_cap}",
            "layers": ", ".join(layers),
            "shared": ", ".join(shared),
        }

    def plan(self, graph: Graph, ranks: int, readings: Sequence[Reading]) -> Pipeline:
        """The stages and their schedule.

        Raises:
            PlanError: as ``plan_pipeline``; or a schedule that would hang.
        """
        pipeline = plan_pipeline(
            graph,
            ranks,
            self.microbatches,
            self.schedule,
            readers=[number for number, unit in enumerate(readings) if INPUT in unit.reads],
            chunks=self.chunks,
            recompute=self.recompute,
            objective=self.balance or ("time" if self.sample is not None else "params"),
            memory_cap=self.memory_cap,
        )
        pipeline.training(self.microbatches)
        return pipeline


def refuse_together(error: str, transport: Transport) -> None:
    """An error of one rank is everyone's. Collective.

    Raises:
        PlanError: on every rank.
    """
    told = transport.allgather(error.encode())
    for rank, message in enumerate(told):
        if message:
            alone = len(set(told)) == 1
            raise PlanError(message.decode() if alone else f"rank {rank}: {message.decode()}")
