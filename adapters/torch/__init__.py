"""Horovod for PyTorch, made right: every public name of ``horovod.torch``, and ours."""

from hvdscale.runtime.horovod import require_horovod

require_horovod("torch")

from horovod.torch import *  # noqa: E402, F403  placeholder until every name is listed
from horovod.torch import rank, size, allreduce  # noqa
from hvdscale.torch.runtime import init, runtime_settings, shutdown, world  # noqa: E402

__all__ = ["init", "runtime_settings", "shutdown", "world"]
