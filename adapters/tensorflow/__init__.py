"""Horovod for TensorFlow, made right: every public name of ``horovod.tensorflow``, and ours."""

from hvdscale.runtime.horovod import require_horovod

require_horovod("tensorflow")

from horovod.tensorflow import rank, size, allreduce  # noqa
from hvdscale.tensorflow.runtime import init, runtime_settings, shutdown, world  # noqa: E402

__all__ = ["init", "runtime_settings", "shutdown", "world"]
