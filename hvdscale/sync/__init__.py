"""When and on what ranks agree."""

from hvdscale.sync.every_step import EveryStep
from hvdscale.sync.kinds import Kind, common_kinds
from hvdscale.sync.reduction import Reduction, read_groups

__all__ = ["EveryStep", "Kind", "Reduction", "common_kinds", "read_groups"]
