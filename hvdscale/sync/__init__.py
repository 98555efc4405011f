"""When and on what ranks agree."""

from hvdscale.sync.every_step import EveryStep
from hvdscale.sync.reduction import Reduction

__all__ = ["EveryStep", "Reduction"]
