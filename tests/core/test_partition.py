"""Dividing graphs: chains exactly, other graphs within their bounds, and never against the flow of data."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hvdscale.errors import PlanError
from hvdscale.model.graph import Edge, Graph, Node
from hvdscale.model.partition import Objective, Partition, partition


def chain(costs: list[int], cut_bytes: list[int] | int = 1) -> Graph:
    return Graph.chain([Node(f"n{i}", float(c), c * 10, c) for i, c in enumerate(costs)], cut_bytes)


def every_division(n: int, parts: int) -> list[list[int]]:
    """The part of each node, for all ways to cut a chain."""
    cuts = itertools.combinations(range(1, n), parts - 1)
    return [[sum(i >= c for c in some) for i in range(n)] for some in cuts]


@settings(max_examples=50, deadline=None)
@example([(0, 0), (13, 0), (20, 0), (0, 1)], 3, "time", None)  # a node without weight behind a sum that rounds
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 5)), min_size=1, max_size=9),
    st.integers(1, 4),
    st.sampled_from(["time", "params", "memory"]),
    st.one_of(st.none(), st.integers(100, 2500)),
)
def test_a_chain_is_divided_as_trying_everything_would(
    nodes: list[tuple[int, int]], parts: int, objective: Objective, cap: int | None
) -> None:
    graph = chain([cost for cost, _ in nodes], [cut for _, cut in nodes[1:]])
    if parts > len(nodes):
        with pytest.raises(PlanError, match="Each part has a node"):
            partition(graph, parts, objective)
        return
    scale = {"time": 1, "params": 10, "memory": 41}[objective]

    def loads(division: list[int], factor: int) -> list[int]:
        return [factor * sum(c for (c, _), p in zip(nodes, division, strict=True) if p == k) for k in range(parts)]

    allowed = [d for d in every_division(len(nodes), parts) if cap is None or max(loads(d, 41)) <= cap]
    if not allowed:
        with pytest.raises(PlanError, match=f"more than {cap:,} bytes"):
            partition(graph, parts, objective, cap)
        return
    best = min((max(loads(d, scale)), graph.cut_bytes(d)) for d in allowed)
    found = partition(graph, parts, objective, cap)
    assert (found.bottleneck, found.cut_bytes) == best
    assert found.gap == 0
    assert list(found.part_of) in allowed
    assert sorted(set(found.part_of)) == list(range(parts))


def test_equal_layers_are_dealt_out_evenly() -> None:
    assert [len(part) for part in partition(chain([1] * 12), 4).parts] == [3, 3, 3, 3]
    assert sorted(len(part) for part in partition(chain([1] * 10), 4).parts) == [2, 2, 3, 3]


def test_a_shared_parameter_counts_once_in_a_part() -> None:
    tied = {"embedding": 80}
    graph = Graph.chain(
        [Node("in", 1, 80, ties=tied), Node("a", 1, 10), Node("b", 1, 10), Node("out", 1, 90, ties=tied)]
    )
    assert graph.parameter_bytes(range(4)) == 110
    assert partition(graph, 1, memory_cap=440).part_of == (0, 0, 0, 0)
    with pytest.raises(PlanError, match="out, 360"):
        partition(graph, 2, memory_cap=359)


def random_graph(n: int, seed: int) -> Graph:
    random = np.random.default_rng(seed)
    edges = {(max(0, i - int(random.integers(1, 30 if j else 3))), i) for i in range(1, n) for j in range(2)}
    size = random.integers(1, 1000, n)
    nodes = tuple(Node(f"n{i}", float(cost), 8, 8) for i, cost in enumerate(random.integers(1, 20, n)))
    return Graph(nodes, tuple(Edge(a, b, int(size[a])) for a, b in sorted(edges)))


def check(graph: Graph, found: Partition, parts: int, balance: float) -> None:
    assert sorted(set(found.part_of)) == list(range(parts))
    assert all(found.part_of[e.source] <= found.part_of[e.target] for e in graph.edges), "data flows backwards"
    assert found.bottleneck <= found.lower_bound * (1 + balance) * 1.2
    loads = np.bincount(found.part_of, [node.cost for node in graph.nodes])
    np.testing.assert_allclose(found.weights, loads)
    crossing = {(e.source, found.part_of[e.target]): e.bytes for e in graph.edges}
    expected = sum(size for (source, part), size in crossing.items() if found.part_of[source] != part)
    assert found.cut_bytes == expected


@pytest.mark.parametrize(("n", "parts", "seed"), [(12, 2, 0), (60, 4, 1), (200, 8, 2)])
def test_a_graph_is_divided_along_the_flow_within_its_bounds(n: int, parts: int, seed: int) -> None:
    graph = random_graph(n, seed)
    check(graph, partition(graph, parts), parts, 0.05)


@pytest.mark.parametrize("seed", [7, 8, 9])
def test_no_division_of_a_small_graph_is_much_better(seed: int) -> None:
    """Against all of them: of those as even the smallest cut, nearly, and nearly as even as can be."""
    graph = random_graph(11, seed)
    found = partition(graph, 2, balance=0.1)
    costs = np.array([node.cost for node in graph.nodes])
    divisions = [d for d in itertools.product((0, 1), repeat=11) if len(set(d)) == 2]
    flowing = [d for d in divisions if all(d[e.source] <= d[e.target] for e in graph.edges)]
    load = {d: max(costs[np.array(d) == 0].sum(), costs[np.array(d) == 1].sum()) for d in flowing}
    assert found.bottleneck <= min(load.values()) * 1.1 + 1e-9
    assert found.cut_bytes <= 1.1 * min(graph.cut_bytes(d) for d in flowing if load[d] <= found.bottleneck)


def test_two_branches_go_to_two_parts() -> None:
    """Cutting between branches is cheap, cutting through them is not; the order of the nodes hides it."""
    names = [f"{branch}{i}" for i in range(6) for branch in "ab"]
    nodes = (Node("in", 0.1), *(Node(name) for name in names), Node("out", 0.1))
    inner = [Edge(1 + k, 3 + k, 1000) for k in range(len(names) - 2)]
    ends = [Edge(0, 1, 1), Edge(0, 2, 1), Edge(len(names) - 1, len(names) + 1, 1), Edge(len(names), len(names) + 1, 1)]
    found = partition(Graph(nodes, (*inner, *ends)), 2)
    assert found.cut_bytes == 2
    assert found.gap < 0.05


def test_a_long_chain_is_divided_in_time() -> None:
    random = np.random.default_rng(0)
    long = Graph.chain([Node(f"n{i}", float(c)) for i, c in enumerate(random.random(10_000))], 5)
    start = time.process_time()
    assert partition(long, 16).gap == 0
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: Graph(()), "at least one node"),
        (lambda: Graph((Node("a"), Node("a"))), "used twice: a"),
        (lambda: Graph((Node("a"), Node("b")), (Edge(1, 0),)), "leads from 1 to 0"),
        (lambda: Graph((Node("a"),), (Edge(0, 1),)), "leads from 0 to 1"),
        (lambda: Node("a", float("nan")), "node 'a' has nan"),
        (lambda: Node("a", parameter_bytes=1, ties={"k": 2}), "shares 2 bytes of 1"),
        (lambda: partition(chain([1, 1]), 0), "0 parts were asked for"),
        (lambda: partition(chain([1, 1]), 1, "speed"), "it is 'speed'"),  # type: ignore[arg-type]
        (lambda: partition(random_graph(20, 0), 2, memory_cap=5), "more than 5 bytes"),
    ],
)
def test_what_cannot_be_is_refused(make: object, rule: str) -> None:
    with pytest.raises(PlanError, match=rule):
        make()  # type: ignore[operator]


def test_a_partition_prints_its_parts_and_its_gap() -> None:
    text = str(partition(chain([3, 1, 1, 3], 7), 2))
    assert "largest part 4, lower bound 4, gap 0.00%; 7 bytes between parts" in text
    assert "part 1: 4, 2 nodes, 40 parameter bytes: n2 .. n3" in text
