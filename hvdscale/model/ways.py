"""The ways to shard a model: what every adapter's ``shard_model`` refuses alike, and what every sharded model says."""

from __future__ import annotations

from typing import Any

from hvdscale.errors import PlanError
from hvdscale.model.mesh import Mesh
from hvdscale.model.rules import Rules

__all__ = ["check_way", "share_line"]

_WAYS = ("layers", "graph", "features")


def check_way(mesh: Any, by: Any, rules: Rules) -> None:
    """Refuse what is no mesh, a way there is not, and rules of features for stages of whole layers.

    Raises:
        PlanError: on this rank.
    """
    if not isinstance(mesh, Mesh):
        raise PlanError(f"mesh is a Mesh, such as hvd.Mesh(dp=2, tp=2); it is {mesh!r}.")
    if by not in _WAYS:
        raise PlanError(f"by is 'layers', 'graph' or 'features'; it is {by!r}.")
    if by != "features" and mesh.tp == 1 and rules != "auto":
        raise PlanError(
            f"rules say how features are split over tensor ranks; by={by!r} with tp=1 makes stages of whole layers. "
            "Leave them out."
        )


def share_line(held: int, whole: int, rank: int, tp: int = 1) -> str:
    """How many of the model's parameters are on this rank, whose layers are split over ``tp``, for ``describe()``."""
    split = f", with tp={tp}" if tp > 1 else ""
    return f"{held:,} of {whole:,} parameters on rank {rank}: {held / max(whole, 1):.3f}{split}"
