"""What each unit of a model costs, as the planner sees it: parameters, and if measured, time and activations."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hvdscale.model.graph import Edge, Graph, Node
from hvdscale.model.pipeline import INPUT
from hvdscale.runtime.transport import Transport, broadcast

__all__ = ["Cost", "Reading", "graph_of"]


@dataclass(frozen=True)
class Reading:
    """What the planner must know of one unit of a model before anything is measured.

    Args:
        name: in messages and tables.
        reads: the units (``INPUT``: the model's input) whose outputs it takes.
        parameters: bytes of each of its parameters, by a key that is the same where they are the same.
    """

    name: str
    reads: tuple[int, ...]
    parameters: Mapping[int, int]


@dataclass
class Cost:
    """Of one unit for one micro-batch: seconds (or multiplications), kept bytes, output bytes."""

    work: float = 0.0
    kept_bytes: int = 0
    output_bytes: int = 0


def graph_of(
    readings: Sequence[Reading],
    ties: Mapping[int, str],
    measure: Callable[[], Sequence[Cost]] | None,
    transport: Transport,
) -> Graph:
    """The model as the planner sees it; the same on every rank. Collective.

    Args:
        ties: names of shared parameters by their key.
        measure: asked on the first rank; ``None``: work goes by parameters.
    """
    costs: Sequence[Cost] = [Cost() for _ in readings]
    if measure is not None:
        if transport.rank == 0:
            costs = measure()
        rows = json.dumps([[cost.work, cost.kept_bytes, cost.output_bytes] for cost in costs]).encode()
        costs = [Cost(*row) for row in json.loads(broadcast(transport, rows))]
    nodes = []
    for unit, cost in zip(readings, costs, strict=True):
        size = sum(unit.parameters.values())
        shared = {ties[key]: bytes_ for key, bytes_ in unit.parameters.items() if key in ties}
        nodes.append(Node(unit.name, cost.work if measure else float(size), size, cost.kept_bytes, shared))
    edges = [
        Edge(source, target, costs[source].output_bytes)
        for target, unit in enumerate(readings)
        for source in unit.reads
        if source != INPUT
    ]
    return Graph(tuple(nodes), tuple(edges))
