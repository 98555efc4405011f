"""Horovod for PyTorch, made right: every public name of ``horovod.torch``, and ours.

``broadcast_object`` and ``allgather_object`` unpickle what other ranks send, as in Horovod, so use them
among machines you trust.
"""

from hvdscale.runtime.horovod import require_horovod

require_horovod("torch")

# ruff: noqa: E402
from hvdscale.data import BalancedPlan, ShardPlan, ShardStream, pack, split
from hvdscale.errors import BuildError, DesyncError, HvdscaleError, PlanError, StateError, TransportError, WorldError
from hvdscale.model import Mesh
from hvdscale.sync import (
    DiLoCo,
    EveryStep,
    Gossip,
    LocalSGD,
    ParameterServer,
    Reduction,
    SlowMo,
    constant,
    drift_target,
    post_local,
    qsr,
)
from hvdscale.torch import common, compression, elastic, functions, mpi_ops, optimizer, sync_batch_norm
from hvdscale.torch.batch_norm import SyncBatchNorm
from hvdscale.torch.broadcast import broadcast_optimizer_state, broadcast_parameters
from hvdscale.torch.common import *  # noqa: F403
from hvdscale.torch.data import shard_dataset
from hvdscale.torch.gradients import reduce_gradients
from hvdscale.torch.lazy import Lazy
from hvdscale.torch.metrics import write_metrics
from hvdscale.torch.model import shard_model
from hvdscale.torch.objects import allgather_object, broadcast_object
from hvdscale.torch.parallel_layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from hvdscale.torch.parallel_loss import parallel_cross_entropy
from hvdscale.torch.runtime import runtime_settings, world
from hvdscale.torch.samplers import ShardedBatchSampler
from hvdscale.torch.sharded import ShardedModel, clip_grad_norm_
from hvdscale.torch.skips import Skip
from hvdscale.torch.streaming import ShardedIterable
from hvdscale.torch.sync import DistributedOptimizer
from hvdscale.torch.verification import verify_epoch
from hvdscale.update import Nesterov, SlowMomentum

__all__ = [
    *common.__all__,
    "BalancedPlan",
    "BuildError",
    "ColumnParallelLinear",
    "DesyncError",
    "DistributedOptimizer",
    "EveryStep",
    "DiLoCo",
    "Gossip",
    "Lazy",
    "LocalSGD",
    "Mesh",
    "Nesterov",
    "Skip",
    "SlowMo",
    "SlowMomentum",
    "constant",
    "drift_target",
    "post_local",
    "qsr",
    "HvdscaleError",
    "ParameterServer",
    "PlanError",
    "Reduction",
    "RowParallelLinear",
    "ShardPlan",
    "ShardStream",
    "ShardedBatchSampler",
    "ShardedIterable",
    "ShardedModel",
    "StateError",
    "SyncBatchNorm",
    "TransportError",
    "VocabParallelEmbedding",
    "WorldError",
    "allgather_object",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "clip_grad_norm_",
    "compression",
    "elastic",
    "functions",
    "mpi_ops",
    "optimizer",
    "pack",
    "parallel_cross_entropy",
    "reduce_gradients",
    "runtime_settings",
    "shard_dataset",
    "shard_model",
    "split",
    "sync_batch_norm",
    "verify_epoch",
    "world",
    "write_metrics",
]
