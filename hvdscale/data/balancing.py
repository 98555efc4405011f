"""Sharing out one global batch so that ranks finish together, though samples differ in length.

Longest processing time first (Graham, "Bounds on multiprocessing timing anomalies", 1969), in rounds of one
sample a rank where counts must be equal; then samples are moved or swapped away from the most loaded rank.
Decisions depend on single additions and comparisons of float64 alone, so every machine takes the same.
"""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

from hvdscale.data.checks import array, flag, integer
from hvdscale.data.lengths import check_factor, check_lengths
from hvdscale.data.types import Int64s
from hvdscale.errors import PlanError

__all__ = ["LONGEST", "balance", "rank_costs"]

LONGEST = 2**48  # its square, and the sum of as many as fit in memory, stay far inside float64
_MOST_RANKS = 2**31 - 1
_CLOSE_ENOUGH = 1.001  # refinement stops when no rank costs more than this times what one must cost
_LEAST_GAIN = 1e-4  # an exchange must take this share off the most loaded rank
_STEPS_PER_RANK = 32

Int32s = npt.NDArray[np.int32]
Float64s = npt.NDArray[np.float64]


def balance(
    lengths: npt.ArrayLike, ranks: int, linear: float = 1.0, quadratic: float = 0.0, equal_counts: bool = False
) -> Int32s:
    """The rank of each sample of one global batch, so that the costliest rank costs little more than the mean.

    A sample of length L costs ``linear * L + quadratic * L**2``: of a transformer, ``quadratic / linear`` is about
    1 / (6 * width). Every rank passes the same lengths and gets the same answer; nothing is sent. No
    rank can cost less than the longest sample: where one costs more than the mean, ranks wait for it.

    Ranks get different numbers of samples, so average gradients by samples or tokens, not by ranks.

    Args:
        lengths: int[batch], identical on all ranks.
        ranks: number of ranks.
        linear: cost of a token, in any unit, from 0.
        quadratic: cost of a pair of tokens, in the same unit, from 0.
        equal_counts: give every rank as many samples; numbers differ by one if ``batch % ranks`` is not 0.

    Returns:
        int32[batch], the rank of each sample.

    Raises:
        PlanError: an argument out of its range, or two factors that are both 0.
    """
    ranks = integer("ranks", ranks, 1, _MOST_RANKS)
    equal_counts = flag("equal_counts", equal_counts)
    costs = _costs(lengths, linear, quadratic)
    order = np.argsort(-costs, kind="stable")
    owner = (_in_rounds if equal_counts else _longest_first)(costs, order, ranks)
    _refine(costs, owner, ranks, moves=not equal_counts)
    return owner


def rank_costs(
    lengths: npt.ArrayLike, owner: npt.ArrayLike, ranks: int, linear: float = 1.0, quadratic: float = 0.0
) -> Float64s:
    """What each rank's samples cost: float64[ranks]. ``costs.max() / costs.mean()`` is how long ranks wait.

    Args:
        lengths: int[batch].
        owner: int[batch], the rank of each sample, from ``balance`` or any other split.
        ranks, linear, quadratic: as in ``balance``.

    Raises:
        PlanError: an argument out of its range, or owners that do not fit the lengths.
    """
    ranks = integer("ranks", ranks, 1, _MOST_RANKS)
    costs = _costs(lengths, linear, quadratic)
    owners = array("Owners", owner)
    if owners.shape != costs.shape or (owners.size and owners.dtype.kind not in "iu"):
        raise PlanError(
            f"Each of the {costs.size} samples has one owner, an integer; owners are {owners.dtype}{owners.shape}."
        )
    if owners.size and not 0 <= int(owners.min()) <= int(owners.max()) < ranks:
        raise PlanError(f"Owners lie in 0..{ranks - 1}; these go from {owners.min()} to {owners.max()}.")
    return _loads(costs, owners.astype(np.int32), ranks)


def _costs(lengths: npt.ArrayLike, linear: float, quadratic: float) -> Float64s:
    a, b = check_factor("linear", linear), check_factor("quadratic", quadratic)
    if a == 0 == b:
        raise PlanError("A sample costs linear * L + quadratic * L**2; both factors are 0, so nothing costs anything.")
    tokens = check_lengths(lengths, LONGEST).astype(np.float64)
    return a * tokens + b * tokens * tokens


def _loads(costs: Float64s, owner: Int32s, ranks: int) -> Float64s:
    loads = np.zeros(ranks)
    np.add.at(loads, owner, costs)  # one by one, in the order of samples
    return loads


def _longest_first(costs: Float64s, order: Int64s, ranks: int) -> Int32s:
    """The costliest sample left goes to the least loaded rank; of equals to the one with fewest samples."""
    owner = np.empty(len(costs), np.int32)
    heap = [(0.0, 0, rank) for rank in range(min(ranks, len(costs)))]
    for sample, cost in zip(order.tolist(), costs[order].tolist(), strict=True):
        load, count, rank = heap[0]
        owner[sample] = rank
        heapq.heapreplace(heap, (load + cost, count + 1, rank))
    return owner


def _in_rounds(costs: Float64s, order: Int64s, ranks: int) -> Int32s:
    """Each round gives every rank one sample, the costliest to the least loaded."""
    owner = np.empty(len(costs), np.int32)
    loads = np.zeros(ranks)
    for start in range(0, len(order), ranks):
        samples = order[start : start + ranks]
        least_first = np.argsort(loads, kind="stable")[: len(samples)]
        owner[samples] = least_first
        loads[least_first] += costs[samples]
    return owner


def _refine(costs: Float64s, owner: Int32s, ranks: int, moves: bool) -> None:
    """Take cost off the most loaded rank, by the one exchange that brings it closest to another rank, while it helps.

    Changes ``owner`` in place.
    """
    loads = _loads(costs, owner, ranks)
    enough = _CLOSE_ENOUGH * max(float(loads.mean()), float(costs.max(initial=0.0)))
    for _ in range(_STEPS_PER_RANK * ranks):
        high = int(loads.argmax())
        if loads[high] <= enough:
            return
        mine = np.flatnonzero(owner == high)
        for low in np.argsort(loads, kind="stable").tolist():
            gap, least = float(loads[high] - loads[low]), _LEAST_GAIN * float(loads[high])
            found = _exchange(costs, mine, np.flatnonzero(owner == low), gap, least, moves)
            if found is not None:
                given, taken = found
                owner[given] = low
                if taken is not None:
                    owner[taken] = high
                loads = _loads(costs, owner, ranks)
                break
        else:
            return


def _exchange(
    costs: Float64s, mine: Int64s, theirs: Int64s, gap: float, least: float, moves: bool
) -> tuple[int, int | None] | None:
    """The sample to give, and the one to take for it (or none), that move a cost nearest to half the ``gap``.

    ``None`` where nothing takes ``least`` off the costlier rank.
    """
    back = theirs[np.argsort(costs[theirs], kind="stable")]  # [candidates], by cost
    offers = costs[back]
    if moves:
        back, offers = np.append(-1, back), np.append(0.0, offers)
    if not len(back):
        return None
    wanted = costs[mine] - gap / 2  # [mine], what to get in return
    after = np.searchsorted(offers, wanted)
    best: tuple[float, int, int] | None = None
    for at in (np.maximum(after - 1, 0), np.minimum(after, len(offers) - 1)):
        miss = np.abs(wanted - offers[at])
        i = int(miss.argmin())
        if best is None or miss[i] < best[0]:
            best = float(miss[i]), int(mine[i]), int(back[at[i]])
    assert best is not None
    miss_of_best, given, taken = best
    if gap / 2 - miss_of_best < least:  # the costlier of the two would cost this much less
        return None
    return given, None if taken < 0 else taken
