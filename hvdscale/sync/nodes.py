"""Which ranks share a node: by host, or as the plan says. Inside a node links are fast, between nodes slow.

Lin, Stich, Patel and Jaggi, "Don't use large mini-batches, use local SGD", arXiv 1808.07217, for hierarchical local
SGD.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hvdscale.errors import PlanError
from hvdscale.runtime.channel import Channel

__all__ = ["Groups", "Nodes", "check_groups", "find_nodes"]

Groups = str | tuple[tuple[int, ...], ...]


def check_groups(groups: object) -> None:
    """Raise PlanError unless ``groups`` is ``"world"``, ``"node"`` or a tuple of tuples of ranks, each rank once."""
    if groups in ("world", "node"):
        return
    if isinstance(groups, tuple) and groups and all(isinstance(group, tuple) and group for group in groups):
        ranks = [rank for group in groups for rank in group]
        whole = all(isinstance(rank, int) and not isinstance(rank, bool) and rank >= 0 for rank in ranks)
        if whole and len(set(ranks)) == len(ranks):
            return
    raise PlanError(
        'groups is "world", "node" (the ranks of a host), or a tuple of tuples of ranks such as ((0, 1), (2, 3)), each '
        f"rank once; it is {groups!r}."
    )


@dataclass(frozen=True)
class Nodes:
    """``groups``: positions in ``channel``, node by node, each ascending. ``mine``: this rank's."""

    groups: tuple[tuple[int, ...], ...]
    mine: tuple[int, ...]
    channel: Channel

    @property
    def heads(self) -> tuple[int, ...]:
        """The first rank of each node, which speaks for it."""
        return tuple(group[0] for group in self.groups)

    def inside(self, patient: bool = False) -> Channel:
        """A new channel among the ranks of this node. Collective over all ranks."""
        channel = self.channel.split(self.groups, patient)
        assert channel is not None  # every rank is in a node
        return channel

    def between(self, patient: bool = False) -> Channel | None:
        """A new channel among the heads; ``None`` on other ranks. Collective over all ranks."""
        return self.channel.split([self.heads], patient)

    def sums(self, shares: np.ndarray) -> np.ndarray:
        """float64[nodes] of float64[ranks]: added up over each node."""
        return np.array([shares[list(group)].sum() for group in self.groups])


def find_nodes(groups: Groups, channel: Channel) -> Nodes | None:
    """The nodes among the ranks of ``channel``; ``None`` where all meet with all. Collective.

    Raises:
        PlanError: the given groups are not those ranks, each once.
    """
    if groups == "world":
        return None
    if groups == "node":
        hosts = channel.table(np.array([channel.host()]))[:, 0]
        members: dict[float, list[int]] = {}
        for rank, host in enumerate(hosts):
            members.setdefault(float(host), []).append(rank)
        found: Sequence[Sequence[int]] = list(members.values())
    else:
        given = sorted(rank for group in groups for rank in group)
        if given != sorted(channel.ranks):
            raise PlanError(
                f"groups={groups} names the ranks {given}, and the ranks that train are {sorted(channel.ranks)}. Put "
                "each of them into one group."
            )
        place = {rank: position for position, rank in enumerate(channel.ranks)}
        found = [[place[rank] for rank in group] for group in groups]  # type: ignore[index]
    nodes = tuple(sorted(tuple(sorted(group)) for group in found))
    return Nodes(nodes, next(group for group in nodes if channel.rank in group), channel)
