"""The contract suite on a GPU: what tests make lies on ``HVDSCALE_DEVICE``, as in scripts that train there.

Only what tests and the layers of torch make. What hvdscale, Horovod and optimizers make for themselves stays where
they put it, so that their own mistakes about devices show. Tests that read a tensor into NumPy get a copy.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

__all__ = ["put_on"]

_MAKERS = ("tests.", "torch.nn.")
_HOST = "tests.contract.test_torch_data"  # its data sets lie in the host's memory, as most do


class _OnDevice(TorchFunctionMode):
    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _device_constructors() or kwargs.get("device") is not None or not _asked_by(*_MAKERS):
            return func(*args, **kwargs)
        if torch._C._len_torch_function_stack() and torch.get_default_device().type == "meta":
            return func(*args, **kwargs)
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type == "cpu":
            wants_gradient = kwargs.pop("requires_grad", False)
            return func(*args, **kwargs).to(self._device).requires_grad_(wants_gradient)
        return func(*args, **{**kwargs, "device": self._device})


def put_on(device: str) -> None:
    """Let tests make their tensors and models on ``device``. Once, before they do."""
    _OnDevice(device).__enter__()
    _wrap(torch, "from_numpy", lambda result: result.to(device))
    _wrap(torch.Tensor, "numpy", None, lambda tensor: tensor.cpu())
    _wrap(torch.Tensor, "__array__", None, lambda tensor: tensor.detach().cpu())
    import hvdscale.torch as hvd

    shard_model = hvd.shard_model

    def shard_there(*args: Any, **kwargs: Any) -> Any:
        with torch.device(device):  # where a model that has no memory yet gets it
            return shard_model(*args, **kwargs)

    hvd.shard_model = shard_there
    torch.testing.assert_close = functools.partial(torch.testing.assert_close, check_device=False)
    equal = torch.equal
    torch.equal = lambda a, b: equal(a.cpu(), b.cpu()) if _asked_by("tests.") else equal(a, b)


Change = Callable[[Any], Any]


def _wrap(owner: Any, name: str, after: Change | None, before: Change | None = None) -> None:
    plain = getattr(owner, name)

    @functools.wraps(plain)
    def wrapped(first: Any, *args: Any, **kwargs: Any) -> Any:
        if not _asked_by("tests."):
            return plain(first, *args, **kwargs)
        result = plain(before(first) if before else first, *args, **kwargs)
        return after(result) if after else result

    setattr(owner, name, wrapped)


def _asked_by(*modules: str) -> bool:
    """Whether the caller of the function that asks is of one of these packages."""
    caller = str(sys._getframe(2).f_globals.get("__name__", ""))
    return caller.startswith(modules) and caller != _HOST
