"""Who applies the update, and how."""

from hvdscale.update.average import Average
from hvdscale.update.delayed_nesterov import DelayedNesterov
from hvdscale.update.elementwise import check_elementwise
from hvdscale.update.nesterov import Nesterov
from hvdscale.update.outer import Outer
from hvdscale.update.placement import Bucket, Piece, Placement, Update, place
from hvdscale.update.slow_momentum import SlowMomentum

__all__ = [
    "Average",
    "Bucket",
    "DelayedNesterov",
    "Nesterov",
    "Outer",
    "Piece",
    "Placement",
    "SlowMomentum",
    "Update",
    "check_elementwise",
    "place",
]
