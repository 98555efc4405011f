"""When and on what ranks agree."""

from hvdscale.sync.every_step import EveryStep

__all__ = ["EveryStep"]
