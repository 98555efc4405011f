"""Horovod for Keras 3, made right, on the TensorFlow and PyTorch backends: every public name of ``horovod.keras``."""

from hvdscale.keras import callbacks, elastic
from hvdscale.keras.backend import verbs
from hvdscale.keras.batch_norm import SyncBatchNormalization
from hvdscale.keras.optimizer import DistributedOptimizer, PartialDistributedOptimizer
from hvdscale.keras.replicas import broadcast_variables
from hvdscale.keras.saving import load_model
from hvdscale.keras.values import allgather, allreduce, broadcast, broadcast_global_variables, reducescatter
from hvdscale.sync import EveryStep

init = verbs.init
shutdown = verbs.shutdown
world = verbs.world
runtime_settings = verbs.runtime_settings
Compression = verbs.Compression

_horovod = verbs.horovod
is_initialized = _horovod.is_initialized
start_timeline = _horovod.start_timeline
stop_timeline = _horovod.stop_timeline
size = _horovod.size
local_size = _horovod.local_size
cross_size = _horovod.cross_size
rank = _horovod.rank
local_rank = _horovod.local_rank
cross_rank = _horovod.cross_rank
mpi_threads_supported = _horovod.mpi_threads_supported
mpi_enabled = _horovod.mpi_enabled
mpi_built = _horovod.mpi_built
gloo_enabled = _horovod.gloo_enabled
gloo_built = _horovod.gloo_built
nccl_built = _horovod.nccl_built
ddl_built = _horovod.ddl_built
ccl_built = _horovod.ccl_built
cuda_built = _horovod.cuda_built
rocm_built = _horovod.rocm_built
Average = _horovod.Average
Sum = _horovod.Sum
Adasum = _horovod.Adasum
Min = _horovod.Min
Max = _horovod.Max
Product = _horovod.Product
ProcessSet = _horovod.ProcessSet
global_process_set = _horovod.global_process_set
add_process_set = _horovod.add_process_set
remove_process_set = _horovod.remove_process_set

__all__ = [
    "Adasum",
    "Average",
    "Compression",
    "DistributedOptimizer",
    "EveryStep",
    "Max",
    "Min",
    "PartialDistributedOptimizer",
    "ProcessSet",
    "Product",
    "Sum",
    "SyncBatchNormalization",
    "add_process_set",
    "allgather",
    "allreduce",
    "broadcast",
    "broadcast_global_variables",
    "broadcast_variables",
    "callbacks",
    "ccl_built",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
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
    "rank",
    "reducescatter",
    "remove_process_set",
    "rocm_built",
    "runtime_settings",
    "shutdown",
    "size",
    "start_timeline",
    "stop_timeline",
    "world",
]
