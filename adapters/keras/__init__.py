"""Horovod for Keras 3, made right, on the TensorFlow and PyTorch backends: every public name of ``horovod.keras``."""

from hvdscale.keras.backend import verbs  # first: it imports Keras quietly

# isort: split
from hvdscale.data import BalancedPlan, ShardPlan, ShardStream, pack, split
from hvdscale.errors import BuildError, DesyncError, HvdscaleError, PlanError, StateError, TransportError, WorldError
from hvdscale.keras import callbacks, elastic
from hvdscale.keras.batch_norm import SyncBatchNormalization
from hvdscale.keras.data import shard_dataset, verify_epoch
from hvdscale.keras.model import shard_model
from hvdscale.keras.optimizer import DistributedOptimizer, PartialDistributedOptimizer
from hvdscale.keras.parallel_loss import parallel_cross_entropy
from hvdscale.keras.replicas import broadcast_variables
from hvdscale.keras.saving import load_model
from hvdscale.keras.sharded import ShardedModel
from hvdscale.keras.values import allgather, allreduce, broadcast, broadcast_global_variables, reducescatter
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
from hvdscale.update import Nesterov, SlowMomentum

_hvd = verbs.hvd
reduce_gradients = verbs.reduce_gradients
init = _hvd.init
shutdown = _hvd.shutdown
world = _hvd.world
write_metrics = verbs.write_metrics
runtime_settings = _hvd.runtime_settings
Compression = _hvd.Compression
is_initialized = _hvd.is_initialized
start_timeline = _hvd.start_timeline
stop_timeline = _hvd.stop_timeline
size = _hvd.size
local_size = _hvd.local_size
cross_size = _hvd.cross_size
rank = _hvd.rank
local_rank = _hvd.local_rank
cross_rank = _hvd.cross_rank
mpi_threads_supported = _hvd.mpi_threads_supported
mpi_enabled = _hvd.mpi_enabled
mpi_built = _hvd.mpi_built
gloo_enabled = _hvd.gloo_enabled
gloo_built = _hvd.gloo_built
nccl_built = _hvd.nccl_built
ddl_built = _hvd.ddl_built
ccl_built = _hvd.ccl_built
cuda_built = _hvd.cuda_built
rocm_built = _hvd.rocm_built
Average = _hvd.Average
Sum = _hvd.Sum
Adasum = _hvd.Adasum
Min = _hvd.Min
Max = _hvd.Max
Product = _hvd.Product
ProcessSet = _hvd.ProcessSet
global_process_set = _hvd.global_process_set
add_process_set = _hvd.add_process_set
remove_process_set = _hvd.remove_process_set

__all__ = [
    "Adasum",
    "Average",
    "BalancedPlan",
    "BuildError",
    "Compression",
    "DesyncError",
    "DiLoCo",
    "DistributedOptimizer",
    "EveryStep",
    "Gossip",
    "HvdscaleError",
    "LocalSGD",
    "Max",
    "Mesh",
    "Min",
    "Nesterov",
    "ParameterServer",
    "PartialDistributedOptimizer",
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
    "allreduce",
    "broadcast",
    "broadcast_global_variables",
    "broadcast_variables",
    "callbacks",
    "ccl_built",
    "constant",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "drift_target",
    "elastic",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
    "init",
    "is_initialized",
    "load_model",
    "local_rank",
    "local_size",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "pack",
    "parallel_cross_entropy",
    "post_local",
    "qsr",
    "rank",
    "reduce_gradients",
    "reducescatter",
    "remove_process_set",
    "rocm_built",
    "runtime_settings",
    "shard_dataset",
    "shard_model",
    "shutdown",
    "size",
    "split",
    "start_timeline",
    "stop_timeline",
    "verify_epoch",
    "world",
    "write_metrics",
]
