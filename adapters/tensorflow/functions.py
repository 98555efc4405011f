"""``horovod.tensorflow.functions``, where scripts look for it."""

from hvdscale.tensorflow.broadcast import broadcast_object_fn, broadcast_variables
from hvdscale.tensorflow.objects import allgather_object, broadcast_object

__all__ = ["allgather_object", "broadcast_object", "broadcast_object_fn", "broadcast_variables"]
