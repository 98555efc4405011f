"""Which gradients ranks exchange, and as what: one answer for all ranks, also where one of them has none."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from hvdscale.runtime.transport import Transport

__all__ = ["Kind", "common_kinds"]


class Kind(IntEnum):
    """What a rank has for one variable. Where ranks differ, all send the greatest: the lesser can be turned into it.

    No gradient is no rows, or zeros; rows are a dense gradient that is zero elsewhere.
    """

    NONE = 0
    SPARSE = 1
    DENSE = 2


def common_kinds(own: Sequence[Kind], transport: Transport) -> tuple[Kind, ...]:
    """Per variable, the kind that every rank sends. A collective: all ranks come with a list of the same length."""
    everyone = transport.allgather(bytes(own))
    return tuple(Kind(max(column)) for column in zip(*everyone, strict=True))
