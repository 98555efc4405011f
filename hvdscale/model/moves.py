"""A division of a graph that is being improved: its cut, weights and memory, kept up to date move by move."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from hvdscale.model.graph import Graph
from hvdscale.model.weights import Memory, Weights

__all__ = ["Division"]


class Division:
    """Nodes in parts, with no part above ``limit`` or, in bytes, ``cap``.

    Args:
        part_of: the part of each node; never decreases along an edge.
    """

    def __init__(
        self,
        graph: Graph,
        part_of: Sequence[int],
        parts: int,
        weights: Weights,
        memory: Memory,
        limit: float,
        cap: float,
    ) -> None:
        self._graph, self._weights, self._memory, self._limit, self._cap = graph, weights, memory, limit, cap
        self._parts = parts
        self._readers = [{e.target: e.bytes for e in edges} for edges in graph.successors]
        self._sources = [[e.source for e in edges] for edges in graph.predecessors]
        self._size = [max(targets.values(), default=0) for targets in self._readers]
        self.part_of = list(part_of)
        self._weigh()

    def _weigh(self) -> None:
        nodes: list[list[int]] = [[] for _ in range(self._parts)]
        for node, part in enumerate(self.part_of):
            nodes[part].append(node)
        self._count = [len(some) for some in nodes]
        self._weight = [self._weights.of_part(some) for some in nodes]
        self._bytes = [self._memory.of_part(some) for some in nodes]
        self._keys = [Counter(key for n in some for key in self._graph.nodes[n].ties) for some in nodes]
        # [node][part]: how many of its readers are there
        self._there = [Counter(self.part_of[t] for t in targets) for targets in self._readers]
        self.cut = sum(self._source_cut(node) for node in range(len(self.part_of)))

    def copy(self, limit: float | None = None) -> Division:
        """Another one in the same state, with another limit if one is given."""
        most = self._limit if limit is None else limit
        return Division(self._graph, self.part_of, self._parts, self._weights, self._memory, most, self._cap)

    @property
    def heaviest(self) -> float:
        """What the heaviest part weighs."""
        return max(self._weight)

    def within(self) -> bool:
        """Whether every part is within the limits."""
        return self.heaviest <= self._limit and max(self._bytes) <= self._cap

    def score(self) -> tuple[float, float]:
        """Smaller is better: what travels, then the largest part."""
        return self.cut, self.heaviest

    def neighbours(self, node: int) -> set[int]:
        """Nodes whose moves are worth another look when this one has moved."""
        near = {*self._readers[node], *self._sources[node]}
        return near | {reader for source in self._sources[node] for reader in self._readers[source]} - {node}

    def options(self, node: int) -> Iterator[tuple[float, int]]:
        """(gain, part) of the moves to a neighbouring part that keep data flowing forwards."""
        for part in (self.part_of[node] - 1, self.part_of[node] + 1):
            if self._flows(node, part):
                yield self.gain(node, part), part

    def allowed(self, node: int, part: int) -> bool:
        """Whether the move keeps the order of data and all limits, and leaves no part empty."""
        here = self.part_of[node]
        if not self._flows(node, part) or self._count[here] == 1:
            return False
        saved = self._memory.saved(node, {key for key in self._graph.nodes[node].ties if self._keys[part][key]})
        return bool(
            self._weight[part] + self._weights.values[node] <= self._limit
            and self._bytes[part] + self._memory.of_node(node) - saved <= self._cap
        )

    def gain(self, node: int, part: int) -> float:
        """How many bytes fewer travel after the move."""
        here = self.part_of[node]
        readers = self._there[node]
        gain = self._size[node] * ((readers[part] > 0) - (readers[here] > 0))
        for source in self._sources[node]:
            origin, there = self.part_of[source], self._there[source]
            if here != origin and there[here] == 1:
                gain += self._size[source]
            if part != origin and there[part] == 0:
                gain -= self._size[source]
        return gain

    def move(self, node: int, part: int) -> None:
        here = self.part_of[node]
        self.cut -= self.gain(node, part)
        it = self._graph.nodes[node]
        for at, sign in ((here, -1), (part, 1)):
            if sign < 0:
                self._keys[at].subtract(it.ties.keys())
            others = {key for key in it.ties if self._keys[at][key] > 0}
            self._bytes[at] += sign * (self._memory.of_node(node) - self._memory.saved(node, others))
            if sign > 0:
                self._keys[at].update(it.ties.keys())
            self._weight[at] += sign * float(self._weights.values[node])
            self._count[at] += sign
        for source in self._sources[node]:
            self._there[source][here] -= 1
            self._there[source][part] += 1
        self.part_of[node] = part

    def even_out(self) -> None:
        """Make the heaviest part lighter as long as a node of it can go to a neighbour that stays lighter."""
        while True:
            heaviest = max(range(self._parts), key=self._weight.__getitem__)
            limit = self._weight[heaviest]
            moves = [
                (max(self._weight[part] + self._weights.values[node], limit - self._weights.values[node]), node, part)
                for node, here in enumerate(self.part_of)
                if here == heaviest and self._weights.values[node] > 0
                for part in (here - 1, here + 1)
                if self.allowed(node, part)
            ]
            if not moves or min(moves)[0] >= limit:
                return
            _, node, part = min(moves)
            self.move(node, part)

    def shake(self, random: np.random.Generator, moves: int) -> None:
        """Some moves at random."""
        for node in random.integers(len(self.part_of), size=moves).tolist():
            for part in random.permutation([self.part_of[node] - 1, self.part_of[node] + 1]).tolist():
                if self.allowed(node, part):
                    self.move(node, part)
                    break

    def _flows(self, node: int, part: int) -> bool:
        if not 0 <= part < self._parts:
            return False
        if part > self.part_of[node]:
            return all(self.part_of[reader] >= part for reader in self._readers[node])
        return all(self.part_of[source] <= part for source in self._sources[node])

    def _source_cut(self, node: int) -> float:
        parts = sum(1 for part, count in self._there[node].items() if count and part != self.part_of[node])
        return self._size[node] * parts
