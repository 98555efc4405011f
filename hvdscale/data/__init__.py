"""Which samples each rank reads."""

from hvdscale.data.batch import Batch
from hvdscale.data.certificate import add_sums
from hvdscale.data.held_out import split
from hvdscale.data.plan import ShardPlan
from hvdscale.data.reader import Reader
from hvdscale.data.report import Move, ShardReport

__all__ = ["Batch", "Move", "Reader", "ShardPlan", "ShardReport", "add_sums", "split"]
