"""How heavy a set of nodes is: what a partition makes equal, and the memory it may not exceed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hvdscale.model.graph import Graph

__all__ = ["Memory", "Weights"]

Float64s = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Memory:
    """Bytes that a set of nodes takes: parameters ``copies`` times, activations ``in_flight`` times."""

    graph: Graph
    copies: float
    in_flight: int

    def of_node(self, node: int) -> float:
        it = self.graph.nodes[node]
        return self.copies * it.parameter_bytes + self.in_flight * it.activation_bytes

    def of_part(self, nodes: Sequence[int]) -> float:
        activations = sum(self.graph.nodes[n].activation_bytes for n in nodes)
        return self.copies * self.graph.parameter_bytes(nodes) + self.in_flight * activations

    def saved(self, node: int, keys: set[str]) -> float:
        """What ``node`` needs less in a part that has the shared parameters ``keys`` already."""
        return self.copies * sum(size for key, size in self.graph.nodes[node].ties.items() if key in keys)


@dataclass(frozen=True)
class Weights:
    """One number per node, float64[nodes]; a part weighs the sum. Shared parameters count where they stand first."""

    values: Float64s

    @classmethod
    def of(cls, graph: Graph, objective: str, memory: Memory) -> Weights:
        if objective == "time":
            return cls(np.array([node.cost for node in graph.nodes], np.float64))
        sizes: list[float] = []
        seen = set[str]()
        for n, node in enumerate(graph.nodes):
            if objective == "params":
                sizes.append(node.parameter_bytes - sum(size for key, size in node.ties.items() if key in seen))
            else:
                sizes.append(memory.of_node(n) - memory.saved(n, seen))
            seen |= node.ties.keys()
        return cls(np.array(sizes, np.float64))

    def of_part(self, nodes: Sequence[int]) -> float:
        return float(self.values[list(nodes)].sum())

    def lower_bound(self, parts: int) -> float:
        """No partition into so many parts has a smaller largest one."""
        return max(float(self.values.sum()) / parts, float(self.values.max()))
