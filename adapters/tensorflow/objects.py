"""Horovod's broadcasts of any object, under a name that does not depend on the object.

Horovod names the message after the object's type: where only the first rank has the object and the others pass
``None``, ranks wait under different names for ever.
"""

from __future__ import annotations

from typing import Any

from horovod.tensorflow import functions
from horovod.tensorflow.mpi_ops import ProcessSet, global_process_set

__all__ = ["allgather_object", "broadcast_object"]


def broadcast_object(
    obj: Any,
    root_rank: int = 0,
    session: Any = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """The object of ``root_rank``, on every rank; the others may pass anything. Unpickles. Collective."""
    return functions.broadcast_object(obj, root_rank, session, name or "broadcast_object", process_set)


def allgather_object(
    obj: Any, session: Any = None, name: str | None = None, process_set: ProcessSet = global_process_set
) -> list[Any]:
    """Every rank's object, in rank order. Unpickles. Collective."""
    gathered: list[Any] = functions.allgather_object(obj, session, name or "allgather_object", process_set)
    return gathered
