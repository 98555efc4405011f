"""Which samples each rank reads."""

from hvdscale.data.balanced import BalancedPlan, BalancedReader
from hvdscale.data.balancing import balance, rank_costs
from hvdscale.data.feed import Feed
from hvdscale.data.held_out import split
from hvdscale.data.packing import Packing, PackingReport, pack
from hvdscale.data.plan import ShardPlan
from hvdscale.data.streams import ShardStream

__all__ = [
    "BalancedPlan",
    "BalancedReader",
    "Feed",
    "Packing",
    "PackingReport",
    "ShardPlan",
    "ShardStream",
    "balance",
    "pack",
    "rank_costs",
    "split",
]
