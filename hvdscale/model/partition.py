"""Which nodes of a graph run where: parts of equal work, between which little travels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, get_args

from hvdscale.errors import PlanError
from hvdscale.model.chain import split_chain
from hvdscale.model.dag import split_graph
from hvdscale.model.graph import Graph
from hvdscale.model.weights import Memory, Weights

__all__ = ["Objective", "Partition", "partition"]

Objective = Literal["time", "memory", "params"]


@dataclass(frozen=True)
class Partition:
    """Nodes of a graph dealt out to parts, numbered in the order in which data flows through them.

    ``part_of[node]`` never decreases along an edge. ``lower_bound``: no partition has a smaller largest part.
    """

    graph: Graph
    part_of: tuple[int, ...]
    objective: Objective
    weights: tuple[float, ...]  # of each part, in what the objective counts
    lower_bound: float

    @cached_property
    def parts(self) -> tuple[tuple[int, ...], ...]:
        """The nodes of each part."""
        parts: list[list[int]] = [[] for _ in self.weights]
        for node, part in enumerate(self.part_of):
            parts[part].append(node)
        return tuple(tuple(part) for part in parts)

    @property
    def bottleneck(self) -> float:
        """The largest part, which decides how fast the others are."""
        return max(self.weights)

    @property
    def gap(self) -> float:
        """How far the largest part is above the lower bound; 0 is proved best."""
        return self.bottleneck / self.lower_bound - 1 if self.lower_bound else 0.0

    @cached_property
    def cut_bytes(self) -> int:
        """What travels between parts for one micro-batch, one way."""
        return self.graph.cut_bytes(self.part_of)

    def __str__(self) -> str:
        lines = [
            f"{len(self.graph.nodes):,} nodes in {len(self.parts)} parts by {self.objective}: largest part "
            f"{self.bottleneck:.6g}, lower bound {self.lower_bound:.6g}, gap {self.gap:.2%}; "
            f"{self.cut_bytes:,} bytes between parts"
        ]
        for number, (nodes, weight) in enumerate(zip(self.parts, self.weights, strict=True)):
            names = [self.graph.nodes[n].name for n in nodes]
            shown = f"{names[0]} .. {names[-1]}" if len(names) > 1 else names[0]
            lines.append(
                f"  part {number}: {weight:.6g}, {len(nodes):,} nodes, "
                f"{self.graph.parameter_bytes(nodes):,} parameter bytes: {shown}"
            )
        return "\n".join(lines)


def partition(
    graph: Graph,
    parts: int,
    objective: Objective = "time",
    memory_cap: float | None = None,
    *,
    copies: float = 4.0,
    in_flight: int = 1,
    balance: float = 0.05,
) -> Partition:
    """Divide ``graph`` into parts that data flows through in one direction.

    A chain is divided exactly: its largest part is the smallest there can be, and of such divisions the one between
    whose parts the fewest bytes travel. Of another graph, parts stay within ``balance`` of the best largest part
    found, and the bytes between them are made few by local search; ``lower_bound`` and ``gap`` say how far from the
    best the balance may be.

    Args:
        parts: how many; each has at least one node.
        objective: what is made equal: ``"time"`` (cost), ``"memory"`` or ``"params"`` (parameter bytes).
        memory_cap: bytes that no part may exceed.
        copies: how many times a parameter is held: 4 is the weight, its gradient and two moments.
        in_flight: of how many micro-batches a part holds activations at a time.
        balance: how much larger than the best found the largest part may be, where that saves traffic.

    Raises:
        PlanError: more parts than nodes, or no partition found under the memory cap.
    """
    if objective not in get_args(Objective):
        raise PlanError(f'The objective is "time", "memory" or "params"; it is {objective!r}.')
    if parts < 1 or parts > len(graph.nodes):
        raise PlanError(
            f"Each part has a node; {parts} parts were asked for and the model has {len(graph.nodes)} nodes "
            f"({_some([node.name for node in graph.nodes])}). Use fewer stages, or a model in smaller pieces."
        )
    memory = Memory(graph, copies, in_flight)
    weights = Weights.of(graph, objective, memory)
    cap = float("inf") if memory_cap is None else memory_cap
    if graph.is_chain:
        bounds = split_chain(graph, parts, weights, memory, cap)
        part_of = [part for part, (a, b) in enumerate(pairwise(bounds)) for _ in range(a, b)]
    else:
        part_of = split_graph(graph, parts, weights, memory, cap, balance)
    found = tuple(weights.of_part([n for n, p in enumerate(part_of) if p == part]) for part in range(parts))
    bound = max(found) if graph.is_chain else weights.lower_bound(parts)
    return Partition(graph, tuple(part_of), objective, found, bound)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
