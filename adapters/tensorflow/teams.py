"""The ranks along a mesh's axes, as teams and process sets."""

from __future__ import annotations

from hvdscale.model.groups import Groups
from hvdscale.tensorflow.process_sets import intern
from hvdscale.tensorflow.runtime import world

__all__ = ["connect", "data_ranks", "team_along", "tensor_team"]

_groups = Groups(world, intern)
team_along = _groups.team_along
tensor_team = _groups.tensor_team
data_ranks = _groups.data_ranks
connect = _groups.connect
