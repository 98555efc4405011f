"""Schedules by the names users give."""

from __future__ import annotations

from hvdscale.errors import PlanError
from hvdscale.model.actions import Schedule
from hvdscale.model.schedules.gpipe import gpipe
from hvdscale.model.schedules.interleaved import interleaved
from hvdscale.model.schedules.one_f_one_b import one_f_one_b
from hvdscale.model.schedules.zero_bubble import zero_bubble

__all__ = ["SCHEDULES", "make_schedule"]

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb")
_SEVERAL = ("gpipe", "interleaved")


def make_schedule(name: str, ranks: int, microbatches: int, chunks: int = 1) -> Schedule:
    """The schedule called ``name``, with ``chunks`` stages on each rank.

    Raises:
        PlanError: an unknown name, a number below 1, or several stages on a rank where the method takes one.
    """
    if name not in SCHEDULES:
        raise PlanError(f"A schedule is one of {', '.join(SCHEDULES)}; {name!r} is none.")
    for what, value in (("ranks", ranks), ("micro-batches", microbatches), ("stages on each rank", chunks)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise PlanError(f"The number of {what} is a whole number of at least 1; it is {value!r}.")
    if chunks > 1 and name not in _SEVERAL:
        raise PlanError(
            f'Several stages on a rank go with schedule {" or ".join(map(repr, _SEVERAL))}; "{name}" takes one, and '
            f"{chunks} were asked for."
        )
    if name == "gpipe":
        return gpipe(ranks, microbatches, chunks)
    if name == "interleaved":
        return interleaved(ranks, microbatches, chunks)
    return (one_f_one_b if name == "1f1b" else zero_bubble)(ranks, microbatches)
