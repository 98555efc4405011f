"""Putting a parameter together from its parts on the ranks of one copy of a model."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hvdscale.model.layout import Layout
from hvdscale.runtime.team import Team

__all__ = ["gather_whole"]


def gather_whole(
    layout: Layout, name: str, own: npt.NDArray[Any], copy: Team, rank: int, root: int | None = None
) -> npt.NDArray[Any] | None:
    """The whole array ``name``; ``None`` where it was not asked for. Collective over the ranks of ``copy``.

    Args:
        own: the part of ``rank``, which is this one; of a rank that holds none, any array of the same dtype.
        copy: the ranks that hold one copy of the model.
        root: the global rank that gets it; ``None``: all.
    """
    dp = layout.mesh.coordinates(rank).dp
    speakers = layout.speakers(name, dp)
    wanted = [root is None or theirs == root for theirs in copy.ranks]
    sent = np.ascontiguousarray(own).reshape(-1) if rank in speakers else np.empty(0, own.dtype)
    lengths = [int(np.prod(layout.local_shape(name, r))) if r in speakers else 0 for r in copy.ranks]
    mine = wanted[copy.rank]
    received = copy.gather([sent if asked else sent[:0] for asked in wanted], [(n,) if mine else (0,) for n in lengths])
    if not mine:
        return None
    parts = {
        r: part.reshape(layout.local_shape(name, r))
        for r, part in zip(copy.ranks, received, strict=True)
        if r in speakers
    }
    return layout.join(name, parts, dp)
