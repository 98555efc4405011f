"""Who passes weights to whom in a round of gossip: permutations of the ranks, a new set for each round.

Every rank sends one message and receives one for each permutation. One that maps a rank to itself leaves it out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

__all__ = ["TOPOLOGIES", "Permutation", "exponential", "pairs", "ring"]

Permutation = npt.NDArray[np.int64]  # [ranks]: rank r sends to permutation[r]


def ring(number: int, size: int, seed: int) -> list[Permutation]:
    """Both neighbours: each rank keeps a third. Two ranks are one pair.

    Lian et al., "Can decentralized algorithms outperform centralized algorithms?", arXiv 1705.09056 (D-PSGD).
    """
    ranks = np.arange(size)
    return [(ranks + shift) % size for shift in ((1, -1) if size > 2 else (1,))]


def pairs(number: int, size: int, seed: int) -> list[Permutation]:
    """Random pairs, which keep half each; of an odd number of ranks one stays alone.

    Boyd, Ghosh, Prabhakar and Shah, "Randomized gossip algorithms", 2006.
    """
    order = np.random.default_rng([seed, number]).permutation(size)
    partner = np.arange(size)
    left, right = order[0 : size - 1 : 2], order[1::2]
    partner[left], partner[right] = right, left
    return [partner]


def exponential(number: int, size: int, seed: int) -> list[Permutation]:
    """To the rank 1 further, then 2, 4, 8 ...: after one turn of these each has heard of all.

    Assran, Loizou, Ballas and Rabbat, "Stochastic gradient push for distributed deep learning", arXiv 1811.10792.
    """
    turns = max(1, (size - 1).bit_length())
    return [(np.arange(size) + (1 << number % turns)) % size]


TOPOLOGIES: Mapping[str, Callable[[int, int, int], list[Permutation]]] = {
    "ring": ring,
    "pairs": pairs,
    "exponential": exponential,
}
"""By name: ``topology(number of the round, ranks, seed)``."""
