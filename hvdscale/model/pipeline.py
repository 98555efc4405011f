"""A model cut into stages, and how they work together: everything a framework needs to know to carry it out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from hvdscale.errors import PlanError
from hvdscale.model.actions import Schedule
from hvdscale.model.graph import Graph
from hvdscale.model.partition import Objective, Partition, partition
from hvdscale.model.passes import Links, with_messages, with_recompute, with_reductions
from hvdscale.model.schedules import make_schedule
from hvdscale.model.simulate import Costs, Simulation, simulate

__all__ = ["INPUT", "Pipeline", "plan_pipeline"]

INPUT = -1
"""Stands for the model's input where nodes are listed; it is always on the first stage."""


@dataclass(frozen=True)
class Pipeline:
    """Made by ``plan_pipeline``. Stage ``s`` is on rank ``s % ranks`` of the pipeline.

    Args:
        graph: the model; its last node gives the output.
        readers: nodes that read the model's input.
        part: which node is on which stage.
        ranks: of the pipeline.
        method: name of the schedule.
        microbatches: into which a batch is divided, if it has as many samples.
        recompute: forward passes keep only their inputs.
    """

    graph: Graph
    readers: frozenset[int]
    part: Partition
    ranks: int
    method: str
    microbatches: int
    recompute: bool
    _made: dict[tuple[str, int], Schedule] = field(default_factory=dict, repr=False, compare=False)

    @property
    def stages(self) -> int:
        return len(self.part.parts)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        return tuple(range(rank, self.stages, self.ranks))

    @cached_property
    def crossing(self) -> Mapping[tuple[int, int], tuple[int, ...]]:
        """(source stage, target stage) -> the nodes whose outputs go from the one to the other, in order."""
        found: dict[tuple[int, int], set[int]] = {}
        for edge in self.graph.edges:
            a, b = self.part.part_of[edge.source], self.part.part_of[edge.target]
            if a != b:
                found.setdefault((a, b), set()).add(edge.source)
        for node in self.readers:
            if self.part.part_of[node]:
                found.setdefault((0, self.part.part_of[node]), set()).add(INPUT)
        return {pair: tuple(sorted(nodes)) for pair, nodes in sorted(found.items())}

    @property
    def links(self) -> Links:
        return tuple(self.crossing)

    @cached_property
    def ties(self) -> Mapping[str, tuple[int, ...]]:
        """Shared parameters that lie on several ranks, and the stages that hold them; in the same order everywhere."""
        held: dict[str, set[int]] = {}
        for node, stage in zip(self.graph.nodes, self.part.part_of, strict=True):
            for key in node.ties:
                held.setdefault(key, set()).add(stage)
        return {
            key: tuple(sorted(stages))
            for key, stages in sorted(held.items())
            if len({stage % self.ranks for stage in stages}) > 1
        }

    def training(self, microbatches: int) -> Schedule:
        """One training step, ready to run; fewer micro-batches than planned where a batch is small."""
        if ("training", microbatches) not in self._made:
            schedule = self._bare(self.method, microbatches)
            if self.recompute:
                schedule = with_recompute(schedule)
            schedule = with_reductions(with_messages(schedule, self.links), self.ties.values())
            simulate(schedule, links=self.links)  # refuses what would hang
            self._made["training", microbatches] = schedule
        return self._made["training", microbatches]

    def evaluation(self, microbatches: int) -> Schedule:
        """The forward passes alone."""
        if ("evaluation", microbatches) not in self._made:
            full = with_messages(self._bare("gpipe", microbatches), self.links)
            kept = ("F", "SF", "RF")
            forward = full.edited(lambda rank, action: (action,) if action.kind in kept else (), "evaluation")
            self._made["evaluation", microbatches] = forward
        return self._made["evaluation", microbatches]

    def _bare(self, method: str, microbatches: int) -> Schedule:
        return make_schedule(method, self.ranks, microbatches, self.stages // self.ranks)

    def costs(self) -> Costs:
        """What the graph says of each stage: a third of a node's cost is its forward pass."""
        nodes = self.graph.nodes
        total = [sum(nodes[n].cost for n in part) for part in self.part.parts]
        kept = tuple(sum(nodes[n].activation_bytes for n in part) for part in self.part.parts)
        inputs = [0] * self.stages
        for edge in self.graph.edges:
            a, b = self.part.part_of[edge.source], self.part.part_of[edge.target]
            inputs[b] += edge.bytes * (a != b)
        return Costs(
            tuple(cost / 3 for cost in total),
            tuple(cost * 2 / 3 for cost in total),
            activation_bytes=kept,
            input_bytes=tuple(inputs),
        )

    @cached_property
    def simulation(self) -> Simulation:
        """A training step played through with the costs of the graph."""
        return simulate(self.training(self.microbatches), self.costs(), self.links)

    def describe(self, unit: str = "") -> str:
        """A table: stage, rank, nodes, parameters, memory, and what is predicted of a step. ``unit``: of the costs."""
        rows = [("stage", "rank", "layers", "parameters", "activations", "share of work")]
        nodes, whole = self.graph.nodes, sum(node.cost for node in self.graph.nodes)
        for stage, part in enumerate(self.part.parts):
            names = [nodes[n].name for n in part]
            cost = sum(nodes[n].cost for n in part)
            rows.append(
                (
                    str(stage),
                    str(stage % self.ranks),
                    names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]} ({len(names)})",
                    _bytes(self.graph.parameter_bytes(part)),
                    _bytes(sum(nodes[n].activation_bytes for n in part)),
                    f"{cost / whole:.1%}" if whole else "",
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        played = self.simulation
        lines.append(
            f"schedule {self.method}{' with recomputation' if self.recompute else ''}, {self.microbatches} "
            f"micro-batches on {self.ranks} ranks: bubble {played.bubble:.1%}, {played.speedup:.2f} times one rank"
            + (f", {played.makespan:.3g} {unit} a step" if unit else "")
        )
        lines.append(
            f"balanced by {self.part.objective}: largest stage {self.part.gap:.1%} above the lower bound; "
            f"{_bytes(self.part.cut_bytes)} between stages for a micro-batch, each way"
        )
        if any(played.peak_bytes):
            peak = ", ".join(map(_bytes, played.peak_bytes))
            lines.append(f"activations held at most, by rank: {peak}")
        for key, stages in self.ties.items():
            lines.append(f"{key} is shared by stages {', '.join(map(str, stages))}: its gradients are added up")
        return "\n".join(lines)


def plan_pipeline(
    graph: Graph,
    ranks: int,
    microbatches: int,
    schedule: str = "1f1b",
    *,
    readers: Collection[int] = (0,),
    chunks: int = 1,
    recompute: bool = False,
    objective: Objective = "params",
    memory_cap: float | None = None,
) -> Pipeline:
    """Cut ``graph`` into ``ranks * chunks`` stages that work by ``schedule``.

    Raises:
        PlanError: as ``make_schedule`` and ``partition``.
    """
    bare = make_schedule(schedule, ranks, microbatches, chunks)
    if len(graph.nodes) < bare.stages:
        names = ", ".join(node.name for node in graph.nodes[:6]) + (", ..." if len(graph.nodes) > 6 else "")
        raise PlanError(
            f"Each of the {bare.stages} stages ({ranks} ranks with {chunks} each) needs a layer; the model has "
            f"{len(graph.nodes)} ({names}). Use fewer stages, or give the model in smaller pieces."
        )
    in_flight = min(microbatches, ranks) if schedule != "gpipe" else microbatches
    part = partition(graph, bare.stages, objective, memory_cap, in_flight=1 if recompute else in_flight)
    return Pipeline(graph, frozenset(readers), part, ranks, schedule, microbatches, recompute)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
