"""Horovod's ``functions`` module: broadcasts of parameters, optimizers and objects."""

from horovod.torch.functions import allgather_object, broadcast_object

from hvdscale.torch.broadcast import broadcast_optimizer_state, broadcast_parameters

__all__ = ["allgather_object", "broadcast_object", "broadcast_optimizer_state", "broadcast_parameters"]
