"""Who applies the update, and how."""

from hvdscale.update.average import Average
from hvdscale.update.delayed_nesterov import DelayedNesterov
from hvdscale.update.nesterov import Nesterov
from hvdscale.update.outer import Outer
from hvdscale.update.slow_momentum import SlowMomentum

__all__ = ["Average", "DelayedNesterov", "Nesterov", "Outer", "SlowMomentum"]
