"""Horovod for TensorFlow, made right: every public name of ``horovod.tensorflow``, and ours."""

# ruff: noqa: E402  Horovod is checked for, and TensorFlow imported quietly, before anything else.

from hvdscale.runtime.console import quiet_import
from hvdscale.runtime.horovod import require_horovod

require_horovod("tensorflow")
with quiet_import("tensorflow"):
    import tensorflow  # noqa: F401

from horovod.tensorflow.functions import allgather_object, broadcast_object
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

from hvdscale.errors import BuildError, DesyncError, HvdscaleError, PlanError, StateError, TransportError, WorldError
from hvdscale.sync import EveryStep
from hvdscale.tensorflow import elastic
from hvdscale.tensorflow.batch_norm import SyncBatchNormalization
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
from hvdscale.tensorflow.optimizer import DistributedOptimizer, LocalGradientAggregationHelper
from hvdscale.tensorflow.runtime import init, runtime_settings, shutdown, world
from hvdscale.tensorflow.tape import DistributedGradientTape, PartialDistributedGradientTape
from hvdscale.tensorflow.wire import Compression

__all__ = [
    "Adasum",
    "Average",
    "BroadcastGlobalVariablesHook",
    "BuildError",
    "Compression",
    "DesyncError",
    "DistributedGradientTape",
    "DistributedOptimizer",
    "EveryStep",
    "HvdscaleError",
    "LocalGradientAggregationHelper",
    "Max",
    "Min",
    "PartialDistributedGradientTape",
    "PlanError",
    "ProcessSet",
    "Product",
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
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "elastic",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
    "gpu_available",
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
    "mpi_threads_supported",
    "nccl_built",
    "process_set_included_op",
    "rank",
    "rank_op",
    "reducescatter",
    "refs_to_vars",
    "remove_process_set",
    "rocm_built",
    "runtime_settings",
    "shutdown",
    "size",
    "size_op",
    "start_timeline",
    "stop_timeline",
    "vars_to_refs",
    "world",
]
