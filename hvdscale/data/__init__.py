"""Which samples each rank reads."""

from hvdscale.data.held_out import split
from hvdscale.data.plan import ShardPlan

__all__ = ["ShardPlan", "split"]
