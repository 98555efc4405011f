"""Dividing any graph: good orders divided as chains, then nodes moved between neighbouring parts.

Moves follow Fiduccia and Mattheyses ("A linear-time heuristic for improving network partitions", 1982), restricted to
those that keep data flowing from lower to higher parts (Moreira, Popp and Schulz, "Graph partitioning with acyclicity
constraints", 2017), and restarted from perturbed solutions.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from hvdscale.errors import PlanError
from hvdscale.model.chain import split_chain
from hvdscale.model.graph import Edge, Graph
from hvdscale.model.moves import Division
from hvdscale.model.weights import Memory, Weights

__all__ = ["split_graph"]

_PASSES = 12  # of moves, at most, from one start
_RESTARTS = 12
_NODES_TO_TRY = 2_000  # nodes times further restarts: small graphs get more of them


def split_graph(graph: Graph, parts: int, weights: Weights, memory: Memory, cap: float, balance: float) -> list[int]:
    """The part of each node.

    Raises:
        PlanError: no order of the nodes could be divided under ``cap`` bytes.
    """
    starts: list[list[int]] = []
    refusals: list[PlanError] = []
    for order in _orders(graph):
        for slack in (0.0, balance):
            try:
                starts.append(_divide(graph, order, parts, weights, memory, cap, slack))
            except PlanError as refusal:
                refusals.append(refusal)
    if not starts:
        raise refusals[0]
    divisions = [Division(graph, start, parts, weights, memory, float("inf"), cap) for start in starts]
    evened = [division.copy() for division in divisions]
    for division in evened:
        division.even_out()
    limit = min(division.heaviest for division in evened) * (1 + balance)
    divisions = [division.copy(limit) for division in (*divisions, *evened)]
    random = np.random.default_rng(0)
    best = min((_improved(division) for division in divisions if division.within()), key=Division.score)
    for _ in range(_RESTARTS + _NODES_TO_TRY // len(graph.nodes)):
        other = best.copy()
        other.shake(random, max(2, len(graph.nodes) // 30))
        if _improved(other).score() < best.score():
            best = other
    return best.part_of


def _divide(
    graph: Graph, order: Sequence[int], parts: int, weights: Weights, memory: Memory, cap: float, slack: float
) -> list[int]:
    """The graph divided as if it were the chain of its nodes in this order."""
    place = {node: i for i, node in enumerate(order)}
    last_reader = [max((place[e.target] for e in graph.successors[node]), default=place[node]) for node in order]
    size = [max((e.bytes for e in graph.successors[node]), default=0) for node in order]
    open_bytes = np.zeros(len(order) + 1)
    for i, (last, carried) in enumerate(zip(last_reader, size, strict=True)):
        open_bytes[i + 1] += carried
        open_bytes[last + 1] -= carried
    crossing = np.cumsum(open_bytes)  # [n + 1]: bytes across the boundary before each place
    chain = Graph(
        tuple(graph.nodes[node] for node in order),
        tuple(Edge(i, i + 1, round(crossing[i + 1])) for i in range(len(order) - 1)),
    )
    in_order = Weights(weights.values[list(order)])
    bounds = split_chain(chain, parts, in_order, Memory(chain, memory.copies, memory.in_flight), cap, slack)
    part_of = [0] * len(order)
    for part, (a, b) in enumerate(pairwise(bounds)):
        for i in range(a, b):
            part_of[order[i]] = part
    return part_of


def _orders(graph: Graph) -> list[list[int]]:
    """Orders in which the graph can run: as given, breadth first, and depth first from either end."""
    n = len(graph.nodes)
    level = [0] * n
    for node in range(n):
        for edge in graph.successors[node]:
            level[edge.target] = max(level[edge.target], level[node] + 1)
    forward = [[e.target for e in edges] for edges in graph.successors]
    backward = [[e.source for e in edges] for edges in graph.predecessors]
    orders = [
        list(range(n)),
        sorted(range(n), key=lambda node: (level[node], node)),
        _depth_first(forward, backward),
        _depth_first(backward, forward)[::-1],
    ]
    return [list(order) for order in dict.fromkeys(map(tuple, orders))]


def _depth_first(forward: list[list[int]], backward: list[list[int]]) -> list[int]:
    """A topological order that follows each branch as far as it goes."""
    missing = [len(sources) for sources in backward]
    ready = [node for node in reversed(range(len(forward))) if not missing[node]]
    order = []
    while ready:
        node = ready.pop()
        order.append(node)
        for target in reversed(forward[node]):
            missing[target] -= 1
            if not missing[target]:
                ready.append(target)
    return order


def _improved(division: Division) -> Division:
    """Passes of moves until one brings nothing."""
    for _ in range(_PASSES):
        if not _pass(division):
            break
    return division


def _pass(division: Division) -> bool:
    """Move each node at most once, the best move first, also when it makes things worse; keep the best state met."""
    start = division.cut
    heap = [(-gain, node, part) for node in range(len(division.part_of)) for gain, part in division.options(node)]
    heapq.heapify(heap)
    moved: list[tuple[int, int]] = []  # (node, where it was)
    locked = [False] * len(division.part_of)
    best, kept = division.cut, 0
    while heap and len(moved) - kept < 200:  # a long way without a better state leads nowhere
        gain, node, part = heapq.heappop(heap)
        if locked[node] or abs(part - division.part_of[node]) != 1 or not division.allowed(node, part):
            continue
        now = division.gain(node, part)
        if now < -gain:
            heapq.heappush(heap, (-now, node, part))
            continue
        moved.append((node, division.part_of[node]))
        division.move(node, part)
        locked[node] = True
        if division.cut < best:
            best, kept = division.cut, len(moved)
        for neighbour in division.neighbours(node):
            if not locked[neighbour]:
                for option, to in division.options(neighbour):
                    heapq.heappush(heap, (-option, neighbour, to))
    for node, part in reversed(moved[kept:]):
        division.move(node, part)
    return best < start
