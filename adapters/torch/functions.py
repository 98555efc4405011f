"""Horovod's ``functions`` module: broadcasts of parameters, optimizers and objects."""

from hvdscale.torch.broadcast import broadcast_optimizer_state, broadcast_parameters
from hvdscale.torch.objects import allgather_object, broadcast_object

__all__ = ["allgather_object", "broadcast_object", "broadcast_optimizer_state", "broadcast_parameters"]
