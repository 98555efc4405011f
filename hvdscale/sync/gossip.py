"""Gossip: each rank averages with a few others; word of its weights reaches the rest through them.

Lian et al., "Can decentralized algorithms outperform centralized algorithms?", arXiv 1705.09056 (D-PSGD, a ring);
Assran, Loizou, Ballas and Rabbat, "Stochastic gradient push for distributed deep learning", arXiv 1811.10792 (SGP).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hvdscale.errors import PlanError
from hvdscale.runtime.channel import Channel
from hvdscale.sync.fragments import Fragment
from hvdscale.sync.hierarchical import Roads
from hvdscale.sync.local_plan import check_whole
from hvdscale.sync.part import Part
from hvdscale.sync.peer import Peer
from hvdscale.sync.peers import TOPOLOGIES
from hvdscale.sync.push_sum import Neighbours
from hvdscale.sync.relaxed import Relaxed
from hvdscale.sync.schedule import Schedule
from hvdscale.sync.tensors import Tensors
from hvdscale.update import Average, Outer

__all__ = ["Gossip"]


@dataclass(frozen=True)
class Gossip(Relaxed):
    """Every ``every`` steps each rank mixes its weights with those of its ``peers``.

    Between rounds no weights are shared: ``sync.outer_weights()`` and ``sync.evaluating()`` take the mean of all ranks,
    and are collective. After ``sync.flush()`` every rank holds that mean, exactly. Every round opens with a header of
    72 bytes from all ranks to all; the weights themselves go to the peers only.

    Args:
        peers: ``"ring"``, both neighbours; ``"pairs"``, a random other rank each time; ``"exponential"``, one message
            to the rank 1, 2, 4, ... further, which takes the fewest rounds until all have heard of each other.
        seed: of the random pairs.

    The other arguments are those of ``Relaxed``. Weights go as fp32: what a narrower wire loses of weights, and not of
    what they learnt, is too much. ``merge="mix:a"`` lets ranks keep more of their own.
    """

    every: int | Schedule = 1
    peers: str = field(default="ring", kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.peers not in TOPOLOGIES:
            raise PlanError(f"peers is one of {', '.join(map(repr, TOPOLOGIES))}; it is {self.peers!r}.")
        check_whole("seed", self.seed, 0)
        if self.wire != "fp32":
            raise PlanError(f'Gossip sends weights, which wire="{self.wire}" would spoil at every round. Use "fp32".')
        if self.groups != "world":
            raise PlanError(
                f"Gossip has peers instead of groups; groups={self.groups!r} does not go with it. Leave groups out, or "
                "use LocalSGD."
            )

        if self.rows != "all":
            raise PlanError(f"Gossip mixes weights, of which every rank has all; rows={self.rows!r} is for LocalSGD.")

    def outer_optimizer(self) -> Outer:
        return Average()

    def part(self, fragment: Fragment, weights: Tensors, channel: Channel, roads: Roads | None) -> Part:
        topology, seed = TOPOLOGIES[self.peers], self.seed
        exchange = Neighbours(
            fragment, channel, lambda number, size: topology(number // self.fragments, size, seed), self.mixing
        )
        return Peer(fragment, weights, exchange)

    def facts(self) -> dict[str, object]:
        return {**super().facts(), "peers": self.peers, "seed": self.seed}
