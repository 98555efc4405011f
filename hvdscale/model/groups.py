"""The ranks along a mesh's axes, opened once each: teams for small exchanges, process sets for gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hvdscale.model.mesh import Axis, Mesh
from hvdscale.runtime.post import Post, SoloPost
from hvdscale.runtime.session import World
from hvdscale.runtime.team import Team, open_team
from hvdscale.runtime.transport import SoloTransport, Transport

__all__ = ["Groups"]


class Groups:
    """An adapter's groups of ranks.

    Args:
        world: gives the job since ``init()``.
        intern: makes Horovod's process sets of groups, collectively over all ranks.
    """

    def __init__(self, world: Callable[[], World], intern: Callable[[Iterable[Sequence[int]]], list[Any]]) -> None:
        self._world, self._intern = world, intern
        self._job: Any = None  # the teams are those of this one
        self._teams: dict[tuple[tuple[int, ...], ...], Team] = {}

    def team_along(self, mesh: Mesh, *axes: Axis) -> Team:
        """The ranks that differ from this one along ``axes`` only. Collective over all ranks.

        Raises:
            PlanError: the mesh is not of as many ranks as there are.
        """
        job = self._world()
        mesh.check(job.size)
        if self._job is not job.transport:
            self._job, self._teams = job.transport, {}
        groups = mesh.groups(*axes)
        if groups not in self._teams:
            self._teams[groups] = open_team(groups, job.transport, self._intern)
        return self._teams[groups]

    def tensor_team(self, mesh: Mesh) -> Team:
        """The ranks that hold the features of the same layers as this one. Collective over all ranks."""
        return self.team_along(mesh, "tp")

    def connect(
        self, mesh: Mesh, open_post: Callable[[Any], Post], control: Callable[[Any], Transport]
    ) -> tuple[Post, Transport]:
        """Messages among the ranks of this rank's pipeline, in the order of their stages; and among those of its copy.

        The copy has as many pipelines as tensor ranks, side by side. Collective over all ranks.

        Args:
            open_post, control: the adapter's, of a process set.
        """
        post = SoloPost() if mesh.pp == 1 else open_post(self._set_along(mesh, "pp"))
        return post, SoloTransport() if mesh.pp * mesh.tp == 1 else control(self._set_along(mesh, "pp", "tp"))

    def data_ranks(self, mesh: Mesh) -> Any:
        """The process set of the ranks that hold the same part of the model as this one. Collective over all ranks.

        Raises:
            PlanError: ``init()`` was called without ``process_sets="dynamic"``, and it takes a set of its own.
        """
        return self._set_along(mesh, "dp")

    def _set_along(self, mesh: Mesh, *axes: Axis) -> Any:
        job = self._world()
        mesh.check(job.size)
        groups = mesh.groups(*axes)
        return self._intern(groups)[groups.index(mesh.group(job.rank, *axes))]
