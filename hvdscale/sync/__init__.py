"""When and on what ranks agree."""

from hvdscale.sync.diloco import DiLoCo
from hvdscale.sync.every_step import EveryStep
from hvdscale.sync.kinds import Kind, common_kinds
from hvdscale.sync.local_sgd import LocalSGD
from hvdscale.sync.reduction import Reduction, read_groups
from hvdscale.sync.relaxed import Relaxed
from hvdscale.sync.rounds import Metrics, Rounds
from hvdscale.sync.schedule import constant, drift_target, post_local, qsr
from hvdscale.sync.slow_mo import SlowMo

__all__ = [
    "DiLoCo",
    "EveryStep",
    "Kind",
    "LocalSGD",
    "Metrics",
    "Reduction",
    "Relaxed",
    "Rounds",
    "SlowMo",
    "common_kinds",
    "constant",
    "drift_target",
    "post_local",
    "qsr",
    "read_groups",
]
