"""What of a model matters to where its parts run: a directed graph of nodes with costs, and edges with bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from hvdscale.errors import PlanError

__all__ = ["Edge", "Graph", "Node"]


@dataclass(frozen=True)
class Node:
    """A layer, or one operation of a traced model.

    Args:
        name: how it is called in plans and messages.
        cost: what one micro-batch takes here, forward and backward; any unit, the same for all nodes.
        parameter_bytes: of its parameters, shared ones included.
        activation_bytes: what the forward pass keeps for the backward pass, for one micro-batch.
        ties: ``key -> bytes`` of parameters that it shares with other nodes; part of ``parameter_bytes``.
    """

    name: str
    cost: float = 1.0
    parameter_bytes: int = 0
    activation_bytes: int = 0
    ties: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what in ("cost", "parameter_bytes", "activation_bytes"):
            value = getattr(self, what)
            if not math.isfinite(value) or value < 0:
                raise PlanError(f"A node's {what} is a finite number of at least 0; node {self.name!r} has {value}.")
        if sum(self.ties.values()) > self.parameter_bytes:
            raise PlanError(
                f"Shared parameters are part of parameter_bytes; node {self.name!r} shares {sum(self.ties.values())} "
                f"bytes of {self.parameter_bytes}."
            )


@dataclass(frozen=True)
class Edge:
    """The output of node ``source`` is read by node ``target``; ``bytes`` for one micro-batch."""

    source: int
    target: int
    bytes: int = 0


@dataclass(frozen=True)
class Graph:
    """Nodes in an order in which they can run, and the edges between them.

    Raises:
        PlanError: no node, an edge that leads backwards or nowhere, or two nodes of the same name.
    """

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.nodes)
        if not n:
            raise PlanError("A graph has at least one node; this one has none. Give a model with layers.")
        if len({node.name for node in self.nodes}) < n:
            names = [node.name for node in self.nodes]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise PlanError(f"Nodes have names of their own; used twice: {', '.join(twice[:5])}.")
        for edge in self.edges:
            if not 0 <= edge.source < edge.target < n:
                raise PlanError(
                    f"Nodes come in an order in which they can run, so an edge leads from a node to a later one; of "
                    f"{n} nodes one leads from {edge.source} to {edge.target}."
                )
            if edge.bytes < 0:
                raise PlanError(f"An edge carries at least 0 bytes; {edge} does not.")

    @classmethod
    def chain(cls, nodes: Sequence[Node], edge_bytes: int | Sequence[int] = 0) -> Graph:
        """Nodes of which each reads the one before it; ``edge_bytes`` between neighbours."""
        between = len(nodes) - 1
        sizes = [edge_bytes] * between if isinstance(edge_bytes, int) else list(edge_bytes)
        if len(sizes) != max(between, 0):
            raise PlanError(f"A chain of {len(nodes)} nodes has {between} edges; {len(sizes)} sizes were given.")
        return cls(tuple(nodes), tuple(Edge(i, i + 1, size) for i, size in enumerate(sizes)))

    @cached_property
    def is_chain(self) -> bool:
        """Whether each node reads the one before it, and nothing else."""
        pairs = {(edge.source, edge.target) for edge in self.edges}
        return pairs <= {(i, i + 1) for i in range(len(self.nodes) - 1)}

    @cached_property
    def successors(self) -> tuple[tuple[Edge, ...], ...]:
        """For each node the edges that leave it."""
        return self._grouped("source")

    @cached_property
    def predecessors(self) -> tuple[tuple[Edge, ...], ...]:
        """For each node the edges that lead to it."""
        return self._grouped("target")

    def cut_bytes(self, part_of: Sequence[int]) -> int:
        """What crosses between parts for one micro-batch; a node's output goes once to each part that reads it."""
        crossing: dict[tuple[int, int], int] = {}
        for edge in self.edges:
            to = part_of[edge.target]
            if part_of[edge.source] != to:
                crossing[edge.source, to] = max(crossing.get((edge.source, to), 0), edge.bytes)
        return sum(crossing.values())

    def parameter_bytes(self, nodes: Iterable[int]) -> int:
        """Of these nodes together: what they share with each other counts once."""
        total, seen = 0, set[str]()
        for n in nodes:
            node = self.nodes[n]
            total += node.parameter_bytes - sum(size for key, size in node.ties.items() if key in seen)
            seen |= node.ties.keys()
        return total

    def _grouped(self, end: str) -> tuple[tuple[Edge, ...], ...]:
        groups: list[list[Edge]] = [[] for _ in self.nodes]
        for edge in self.edges:
            groups[getattr(edge, end)].append(edge)
        return tuple(tuple(group) for group in groups)
