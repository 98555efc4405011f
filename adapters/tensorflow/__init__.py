"""Horovod for TensorFlow, made right: every public name of ``horovod.tensorflow``, and ours."""

# ruff: noqa: E402  Horovod is checked for, and TensorFlow imported quietly, before anything else.

from typing import TYPE_CHECKING, Any

from hvdscale.runtime.console import quiet_import
from hvdscale.runtime.horovod import require_horovod

require_horovod("tensorflow")
with quiet_import("tensorflow"):
    import tensorflow  # noqa: F401

from horovod.tensorflow.mpi_ops import (
    Adasum,
    Average,
    Max,
    Min,
    ProcessSet,
    Product,
    Sum,
    add_process_set,
    ccl_built,
    check_num_rank_power_of_2,
    cross_rank,
    cross_size,
    cuda_built,
    ddl_built,
    global_process_set,
    gloo_built,
    gloo_enabled,
    gpu_available,
    handle_average_backwards_compatibility,
    is_homogeneous,
    is_initialized,
    join,
    local_rank,
    local_rank_op,
    local_size,
    local_size_op,
    mpi_built,
    mpi_enabled,
    mpi_threads_supported,
    nccl_built,
    process_set_included_op,
    rank,
    rank_op,
    remove_process_set,
    rocm_built,
    size,
    size_op,
    start_timeline,
    stop_timeline,
)
from horovod.tensorflow.util import refs_to_vars, vars_to_refs

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
from hvdscale.tensorflow import compression, elastic, functions, gradient_aggregation, model, mpi_ops, sync_batch_norm
from hvdscale.tensorflow.broadcast import (
    BroadcastGlobalVariablesHook,
    broadcast_,
    broadcast_global_variables,
    broadcast_object_fn,
    broadcast_variables,
)
from hvdscale.tensorflow.collectives import (
    allgather,
    allreduce,
    alltoall,
    broadcast,
    grouped_allgather,
    grouped_allreduce,
    grouped_reducescatter,
    reducescatter,
)
from hvdscale.tensorflow.data import shard_dataset
from hvdscale.tensorflow.metrics import write_metrics
from hvdscale.tensorflow.model import parallel_cross_entropy, shard_model
from hvdscale.tensorflow.objects import allgather_object, broadcast_object
from hvdscale.tensorflow.optimizer import DistributedOptimizer, LocalGradientAggregationHelper
from hvdscale.tensorflow.runtime import init, runtime_settings, shutdown, world
from hvdscale.tensorflow.sync import reduce_gradients
from hvdscale.tensorflow.tape import DistributedGradientTape, PartialDistributedGradientTape
from hvdscale.tensorflow.verification import verify_epoch
from hvdscale.tensorflow.wire import Compression
from hvdscale.update import Nesterov, SlowMomentum

if TYPE_CHECKING:
    from hvdscale.tensorflow.model import ShardedModel
    from hvdscale.tensorflow.sync_batch_norm import SyncBatchNormalization

__all__ = [
    "Adasum",
    "Average",
    "BalancedPlan",
    "BroadcastGlobalVariablesHook",
    "BuildError",
    "Compression",
    "DesyncError",
    "DiLoCo",
    "DistributedGradientTape",
    "DistributedOptimizer",
    "EveryStep",
    "Gossip",
    "HvdscaleError",
    "LocalGradientAggregationHelper",
    "LocalSGD",
    "Max",
    "Mesh",
    "Min",
    "Nesterov",
    "ParameterServer",
    "PartialDistributedGradientTape",
    "PlanError",
    "ProcessSet",
    "Product",
    "Reduction",
    "ShardPlan",
    "ShardStream",
    "ShardedModel",
    "SlowMo",
    "SlowMomentum",
    "StateError",
    "Sum",
    "SyncBatchNormalization",
    "TransportError",
    "WorldError",
    "add_process_set",
    "allgather",
    "allgather_object",
    "allreduce",
    "alltoall",
    "broadcast",
    "broadcast_",
    "broadcast_global_variables",
    "broadcast_object",
    "broadcast_object_fn",
    "broadcast_variables",
    "ccl_built",
    "check_num_rank_power_of_2",
    "compression",
    "constant",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "drift_target",
    "elastic",
    "functions",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
    "gpu_available",
    "gradient_aggregation",
    "grouped_allgather",
    "grouped_allreduce",
    "grouped_reducescatter",
    "handle_average_backwards_compatibility",
    "init",
    "is_homogeneous",
    "is_initialized",
    "join",
    "local_rank",
    "local_rank_op",
    "local_size",
    "local_size_op",
    "mpi_built",
    "mpi_enabled",
    "mpi_ops",
    "mpi_threads_supported",
    "nccl_built",
    "pack",
    "parallel_cross_entropy",
    "post_local",
    "process_set_included_op",
    "qsr",
    "rank",
    "rank_op",
    "reduce_gradients",
    "reducescatter",
    "refs_to_vars",
    "remove_process_set",
    "rocm_built",
    "runtime_settings",
    "shard_dataset",
    "shard_model",
    "shutdown",
    "size",
    "size_op",
    "split",
    "start_timeline",
    "stop_timeline",
    "sync_batch_norm",
    "vars_to_refs",
    "verify_epoch",
    "world",
    "write_metrics",
]


def __getattr__(name: str) -> Any:
    """What the Keras adapter has is looked for when it is asked for: it imports this one."""
    if name == "SyncBatchNormalization":
        return sync_batch_norm.SyncBatchNormalization
    if name == "ShardedModel":
        return model.ShardedModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
