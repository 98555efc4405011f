"""The ranks along a mesh's axes, as teams and process sets."""

from __future__ import annotations

from hvdscale.model.groups import Groups
from hvdscale.model.mesh import Mesh
from hvdscale.runtime.team import Team
from hvdscale.torch.process_sets import intern
from hvdscale.torch.runtime import world
from hvdscale.torch.tensor_parallel import keep_from_compilers

__all__ = ["connect", "data_ranks", "team_along", "tensor_team"]

_groups = Groups(world, intern)
team_along = _groups.team_along
data_ranks = _groups.data_ranks
connect = _groups.connect


def tensor_team(mesh: Mesh) -> Team:
    """The ranks that share this rank's layers; what they exchange stays out of compiled graphs. Collective over all."""
    keep_from_compilers()
    return _groups.tensor_team(mesh)
