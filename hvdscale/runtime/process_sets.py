"""One process set per group of ranks: Horovod refuses a second one of the same ranks, and one of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hvdscale.errors import PlanError

__all__ = ["OneRank", "intern"]

_UNKNOWN_TO_HOROVOD = -1


class OneRank:
    """A process set of one rank, which has nobody to exchange with: Horovod knows nothing of it.

    It costs no negotiation; operations of Horovod itself refuse it.
    """

    process_set_id = _UNKNOWN_TO_HOROVOD
    mpi_comm = None

    def __init__(self, rank: int, own_rank: int) -> None:
        self.ranks = [rank]
        self._own_rank = own_rank

    def included(self) -> bool:
        return self.ranks == [self._own_rank]

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1

    def __str__(self) -> str:
        return f"OneRank({self.ranks[0]})"


def intern(groups: Iterable[Sequence[int]], horovod: Any) -> list[Any]:
    """A process set for each group of global ranks: the one there is, or a new one. Collective over all ranks.

    Args:
        groups: the same list in the same order on every rank, its own groups and those of others.
        horovod: Horovod's module of the framework.

    Returns:
        ``ProcessSet`` each; the global one for all ranks, ``OneRank`` for a single one.

    Raises:
        PlanError: a rank twice, a rank there is not, or Horovod was started without process sets that may be added.
    """
    return [_intern(tuple(sorted(group)), horovod) for group in groups]


def _intern(ranks: tuple[int, ...], horovod: Any) -> Any:
    size = horovod.size()
    if not ranks or len(set(ranks)) < len(ranks) or ranks[0] < 0 or ranks[-1] >= size:
        raise PlanError(f"A group holds different ranks out of 0 to {size - 1}; {list(ranks)} was asked for.")
    if len(ranks) == size:
        return horovod.global_process_set
    if len(ranks) == 1:
        return OneRank(ranks[0], horovod.rank())
    from horovod.common import process_sets

    known = {tuple(held): number for number, held in process_sets._basics._get_process_set_ids_and_ranks().items()}
    if ranks in known:
        found = horovod.ProcessSet(list(ranks))
        found.process_set_id = known[ranks]
        return found
    try:
        return horovod.add_process_set(list(ranks))
    except ValueError as error:
        raise PlanError(
            f"The ranks {list(ranks)} are to form a group of their own, and Horovod was started without a way to make "
            'groups later. Call hvd.init(process_sets="dynamic"), or set HOROVOD_DYNAMIC_PROCESS_SETS=1 on every rank.'
        ) from error
