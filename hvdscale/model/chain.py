"""Dividing a chain exactly.

The smallest possible largest part is found by bisection over float64 itself, with a greedy test (Nicol, "Rectilinear
partitioning of irregular data parallel computations", 1994). Of the divisions that reach it, dynamic programming over
sliding windows takes the one that cuts the fewest bytes.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

from hvdscale.errors import PlanError
from hvdscale.model.graph import Graph
from hvdscale.model.weights import Memory, Weights

__all__ = ["split_chain"]

Int64s = npt.NDArray[np.int64]
Float64s = npt.NDArray[np.float64]


def split_chain(
    graph: Graph, parts: int, weights: Weights, memory: Memory, cap: float, slack: float = 0.0
) -> list[int]:
    """Where parts begin and end: ``parts + 1`` numbers of nodes, from 0 to all.

    ``slack``: how much larger than it must be the largest part may be, where that cuts fewer bytes.

    Raises:
        PlanError: no division has every part under ``cap`` bytes of memory.
    """
    n = len(graph.nodes)
    reach = _memory_reach(graph, memory, cap)
    prefix = np.concatenate([[0.0], np.cumsum(weights.values)])  # [n + 1]
    if not _fits(prefix, reach, parts, np.inf):
        alone = max(range(n), key=memory.of_node)
        raise PlanError(
            f"No part may take more than {cap:,.0f} bytes; {parts} parts of {n} nodes cannot. The model takes about "
            f"{memory.of_part(range(n)):,.0f} bytes, its largest node, {graph.nodes[alone].name}, "
            f"{memory.of_node(alone):,.0f}. Use more stages, smaller micro-batches or recomputation."
        )
    limit = _smallest(prefix, reach, parts)
    ends = _ends(prefix, reach, limit * (1 + slack))
    cut = np.zeros(n + 1)  # [n + 1]: bytes across a boundary before node i
    for edge in graph.edges:
        cut[edge.target] = max(cut[edge.target], edge.bytes)
    return _fewest_bytes(prefix, ends, cut, parts)


def _memory_reach(graph: Graph, memory: Memory, cap: float) -> Int64s:
    """int64[n]: the furthest end of a part that starts at each node and fits the cap; two pointers, as parts nest."""
    n = len(graph.nodes)
    if cap == float("inf"):
        return np.full(n, n, np.int64)
    reach = np.zeros(n, np.int64)
    counts: dict[str, int] = {}
    used, end = 0.0, 0
    for start in range(n):
        end = max(end, start)
        while end < n:
            more = memory.of_node(end) - memory.saved(end, {key for key, count in counts.items() if count})
            if used + more > cap:
                break
            used += more
            for key in graph.nodes[end].ties:
                counts[key] = counts.get(key, 0) + 1
            end += 1
        reach[start] = end
        if end > start:
            for key in graph.nodes[start].ties:
                counts[key] -= 1
            used -= memory.of_node(start) - memory.saved(start, {key for key, count in counts.items() if count})
    return reach


def _ends(prefix: Float64s, reach: Int64s, limit: float) -> Int64s:
    """int64[n]: the furthest end of a part that starts at each node and weighs at most ``limit``."""
    return np.minimum(_furthest(prefix, prefix[:-1], limit), reach)


def _furthest(prefix: Float64s, begun: Float64s, limit: float) -> Int64s:
    """The last boundary that lies at most ``limit`` after each of ``begun``, which are values of ``prefix``."""
    ends = np.searchsorted(prefix, begun + limit, side="right") - 1
    # A sum may round to the other side of the limit than the difference that is meant. Before and after nodes without
    # weight lie the same values.
    before = np.searchsorted(prefix, prefix[ends], side="left") - 1
    ends = np.where(prefix[ends] - begun > limit, before, ends)
    following = prefix[np.minimum(ends + 1, len(prefix) - 1)]
    fits = following - begun <= limit
    return np.asarray(np.where(fits, np.searchsorted(prefix, following, side="right") - 1, ends), np.int64)


def _fits(prefix: Float64s, reach: Int64s, parts: int, limit: float) -> bool:
    """Whether at most ``parts`` parts of at most ``limit`` are enough: each taken as long as it can be."""
    n, start = len(reach), 0
    for _ in range(parts):
        end = min(int(_furthest(prefix, prefix[start : start + 1], limit)[0]), int(reach[start]))
        if end >= n:
            return True
        if end <= start:
            return False
        start = end
    return False


def _smallest(prefix: Float64s, reach: Int64s, parts: int) -> float:
    """The smallest limit that fits, to the last bit: bisection over the float64 numbers in their order."""
    low, high = np.float64(prefix[-1] / parts), np.float64(prefix[-1])
    if _fits(prefix, reach, parts, float(low)):
        return float(low)
    # Read as integers, positive numbers keep their order.
    a, b = int(low.view(np.int64)), int(high.view(np.int64))
    while b - a > 1:
        middle = (a + b) // 2
        if _fits(prefix, reach, parts, float(np.int64(middle).view(np.float64))):
            b = middle
        else:
            a = middle
    return float(np.int64(b).view(np.float64))


def _fewest_bytes(prefix: Float64s, ends: Int64s, cut: Float64s, parts: int) -> list[int]:
    """Exactly ``parts`` parts within ``ends``; fewest bytes cut, then the most even end of each part.

    ``best[i]``: bytes cut when the parts so far end before node ``i``. A part ``[i, j)`` is allowed when
    ``j <= ends[i]``, and ``ends`` never decreases: the starts allowed for ``j`` are a sliding window.
    """
    n = len(ends)
    first = np.searchsorted(ends, np.arange(n + 1), side="left")  # [n + 1]: the first start allowed for each end
    best = np.full(n + 1, np.inf)
    best[0] = 0.0
    choices: list[Int64s] = []
    for part in range(parts):
        following = np.full(n + 1, np.inf)
        choice = np.full(n + 1, -1, np.int64)
        window: deque[int] = deque()
        even = float(prefix[-1]) * part / parts  # where this part would start in equal shares
        for end in range(1, n + 1):
            start = end - 1
            if best[start] < np.inf:
                while window and (
                    best[window[-1]] > best[start]
                    or (best[window[-1]] == best[start] and abs(prefix[window[-1]] - even) >= abs(prefix[start] - even))
                ):
                    window.pop()
                window.append(start)
            while window and window[0] < first[end]:
                window.popleft()
            if window:
                choice[end] = window[0]
                following[end] = best[window[0]] + (cut[end] if end < n else 0.0)
        best = following
        choices.append(choice)
    bounds = [n]
    for choice in reversed(choices):
        bounds.append(int(choice[bounds[-1]]))
    return bounds[::-1]
