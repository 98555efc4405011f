"""The process sets of groups of ranks, each made once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import horovod.torch as _horovod
from horovod.torch import ProcessSet

from hvdscale.runtime import process_sets

__all__ = ["intern"]


def intern(groups: Iterable[Sequence[int]]) -> list[ProcessSet]:
    """A process set for each group of global ranks, made if there is none. Collective over all ranks.

    Every rank passes the same groups in the same order, its own and those of others.

    Raises:
        PlanError: a group that cannot be, or ``init()`` was called without ``process_sets="dynamic"``.
    """
    return process_sets.intern(groups, _horovod)
