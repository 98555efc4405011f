"""Handles of asynchronous operations: Horovod's own, with what is left to do once their output is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import horovod.torch as _horovod
from torch import Tensor

from hvdscale.runtime.waiting import pauses
from hvdscale.torch.wire import from_wire

__all__ = [
    "CompoundHandle",
    "Handle",
    "forget_all",
    "overwriting",
    "poll",
    "returning",
    "synchronize",
    "then",
    "wait",
    "with_plain_gradient",
]

Handle = Any  # Horovod's int, or a CompoundHandle

# What is left to do with an operation's output, by Horovod's handle.
_unfinished: dict[int, Callable[[Any], Any]] = {}


@dataclass(frozen=True)
class CompoundHandle:
    """Several operations that make one result. Calling it waits, as for Horovod's handles of sparse tensors."""

    parts: tuple[Handle, ...]
    finish: Callable[[], Tensor]

    def __call__(self) -> Tensor:
        return self.finish()


def synchronize(handle: Handle) -> Any:
    """Wait for an asynchronous operation and return its result: a tensor, or a tuple of them for a group."""
    if isinstance(handle, CompoundHandle):
        return handle()
    try:
        output = wait(handle)
    finally:
        finish = _unfinished.pop(handle, None)
    return output if finish is None else finish(output)


def wait(handle: int) -> Any:
    """Horovod's ``synchronize`` of a tensor or group, asleep meanwhile.

    Horovod's own wait never sleeps: where ranks share cores it takes them from the thread that it waits for.
    """
    try:
        for _ in pauses(lambda: _horovod.poll(handle)):
            pass
    except ValueError:  # of an operation whose output was handed out before
        pass
    return _horovod.synchronize(handle)


def poll(handle: Handle) -> bool:
    """Whether ``synchronize(handle)`` would return at once."""
    parts = handle.parts if isinstance(handle, CompoundHandle) else (handle,)
    return all(_horovod.poll(part) for part in parts)


def then(handle: int, finish: Callable[[Any], Any]) -> int:
    """Let ``synchronize(handle)`` return ``finish(output)``."""
    _unfinished[handle] = finish
    return handle


def forget_all() -> None:
    """Drop what is left to do: Horovod counts its handles anew after a second ``init()``."""
    _unfinished.clear()


def returning(handle: int, tensors: Sequence[Tensor], sent: Sequence[Tensor], group: bool = False) -> int:
    """Give results back in the dtypes and on the devices they were sent from."""
    if [(s.dtype, s.device) for s in sent] == [(t.dtype, t.device) for t in tensors]:
        return handle
    likes = [t.new_empty(0) for t in tensors]
    if not group:
        return then(handle, lambda output: from_wire(output, likes[0]))
    return then(handle, lambda outputs: tuple(map(from_wire, outputs, likes)))


def overwriting(handle: int, tensors: Sequence[Tensor], group: bool = False) -> int:
    """Put results into the caller's tensors, where they are not already, and give those back."""

    def finish(outputs: Any) -> Any:
        for tensor, output in zip(tensors, outputs if group else [outputs], strict=True):
            result = from_wire(output, tensor)
            if result.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(result)
        return tuple(tensors) if group else tensors[0]

    return then(handle, finish)


def with_plain_gradient(output: Tensor) -> Tensor:
    """Horovod's backward passes refuse gradients that are views, such as those of ``sum()``."""
    if output.requires_grad:
        output.register_hook(lambda gradient: gradient.contiguous())
    return output
