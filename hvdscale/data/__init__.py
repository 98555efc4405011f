"""Which samples each rank reads."""

from hvdscale.data.balanced import BalancedPlan, BalancedReader
from hvdscale.data.balancing import balance, rank_costs
from hvdscale.data.batch import Batch
from hvdscale.data.certificate import add_sums
from hvdscale.data.feed import Feed
from hvdscale.data.held_out import split
from hvdscale.data.packing import Packing, PackingReport, pack
from hvdscale.data.passes import Passes
from hvdscale.data.plan import ShardPlan
from hvdscale.data.reader import Reader
from hvdscale.data.report import Move, ShardReport
from hvdscale.data.stream_feed import StreamFeed
from hvdscale.data.stream_reader import StreamReader
from hvdscale.data.streams import ShardStream
from hvdscale.data.tables import Table
from hvdscale.data.verification import verify_feed

__all__ = [
    "BalancedPlan",
    "BalancedReader",
    "Batch",
    "Feed",
    "Move",
    "Packing",
    "PackingReport",
    "Passes",
    "Reader",
    "ShardPlan",
    "ShardReport",
    "ShardStream",
    "StreamFeed",
    "StreamReader",
    "Table",
    "add_sums",
    "balance",
    "pack",
    "rank_costs",
    "split",
    "verify_feed",
]
