"""When and on what ranks agree."""

from hvdscale.sync.asynchronous import Asynchronous
from hvdscale.sync.diloco import DiLoCo
from hvdscale.sync.engine import Engine, begin
from hvdscale.sync.every_step import EveryStep
from hvdscale.sync.gossip import Gossip
from hvdscale.sync.kinds import Kind, common_kinds
from hvdscale.sync.local_plan import LocalPlan
from hvdscale.sync.local_sgd import LocalSGD
from hvdscale.sync.metrics import Metrics
from hvdscale.sync.parameter_server import ParameterServer
from hvdscale.sync.reduction import Reduction, read_groups
from hvdscale.sync.relaxed import Relaxed
from hvdscale.sync.rounds import Rounds
from hvdscale.sync.schedule import constant, drift_target, post_local, qsr
from hvdscale.sync.slow_mo import SlowMo

__all__ = [
    "Asynchronous",
    "DiLoCo",
    "Engine",
    "EveryStep",
    "Gossip",
    "Kind",
    "LocalPlan",
    "LocalSGD",
    "Metrics",
    "ParameterServer",
    "Reduction",
    "Relaxed",
    "Rounds",
    "SlowMo",
    "begin",
    "common_kinds",
    "constant",
    "drift_target",
    "post_local",
    "qsr",
    "read_groups",
]
