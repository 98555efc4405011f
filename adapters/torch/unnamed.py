"""Names for operations the caller gave none, the same on every rank that takes part.

Horovod calls such an operation after its handle, and counts handles over everything a process ever started. Once ranks
have started different numbers of operations, as they do when one of them is alone in a process set, they would wait for
each other under different names for ever. Here each kind of operation is counted by process set; the operations of
backward passes, which have no place for a name, are counted with them.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

from horovod.torch import mpi_ops

__all__ = ["count_anew", "name_the_unnamed"]

_STARTS = (
    "_allgather_async",
    "_allreduce_async",
    "_alltoall_async",
    "_broadcast_async",
    "_grouped_allgather_async",
    "_grouped_allreduce_async",
    "_grouped_reducescatter_async",
    "_reducescatter_async",
)

_started: Counter[tuple[str, int]] = Counter()  # by kind and process set


def name_the_unnamed() -> None:
    """Let every way to start an operation, Horovod's own backward passes included, name it. Twice changes nothing."""
    for function in _STARTS:
        start = getattr(mpi_ops, function)
        if not hasattr(start, "_hvdscale"):
            setattr(mpi_ops, function, _naming(start, function.strip("_").removesuffix("_async")))


def count_anew() -> None:
    """Start at zero. Every rank does when it joins a job, so that a rank that joins later counts with the others."""
    _started.clear()


def _naming(start: Callable[..., int], kind: str) -> Callable[..., int]:
    parameters = list(inspect.signature(start).parameters)
    name, process_set = parameters.index("name"), parameters.index("process_set")

    @functools.wraps(start)
    def named(*args: Any) -> int:
        if args[name] is None:
            key = kind, args[process_set].process_set_id
            _started[key] += 1
            args = (*args[:name], f"{kind}.unnamed.{_started[key]}", *args[name + 1 :])
        return start(*args)

    named._hvdscale = True  # type: ignore[attr-defined]
    return named
