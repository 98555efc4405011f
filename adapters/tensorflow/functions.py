"""``horovod.tensorflow.functions``, where scripts look for it."""

from horovod.tensorflow.functions import allgather_object, broadcast_object

from hvdscale.tensorflow.broadcast import broadcast_object_fn, broadcast_variables

__all__ = ["allgather_object", "broadcast_object", "broadcast_object_fn", "broadcast_variables"]
