"""A mesh is a grid of ranks: every rank has one place, and the groups along any axes are a partition."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdscale.errors import PlanError
from hvdscale.model.mesh import Coordinates, Mesh

MESHES = st.builds(Mesh, dp=st.integers(1, 4), pp=st.integers(1, 4), tp=st.integers(1, 4))
AXES = st.sets(st.sampled_from(["dp", "pp", "tp"]))


def test_tensor_neighbours_lie_next_to_each_other() -> None:
    mesh = Mesh(dp=2, pp=2, tp=2)
    assert [mesh.coordinates(rank) for rank in (0, 1, 2, 4)] == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    assert mesh.groups("tp") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert mesh.groups("pp") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert mesh.groups("dp") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert mesh.groups("pp", "tp") == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert mesh.groups() == tuple((rank,) for rank in range(8))


@given(MESHES, AXES)
def test_groups_are_a_partition_of_equal_parts(mesh: Mesh, axes: set[str]) -> None:
    groups = mesh.groups(*axes)  # type: ignore[arg-type]
    assert sorted(rank for group in groups for rank in group) == list(range(mesh.size))
    assert {len(group) for group in groups} == {mesh.size // len(groups)}
    for group in groups:
        for rank in group:
            assert mesh.group(rank, *axes) == group  # type: ignore[arg-type]
        for axis in {"dp", "pp", "tp"} - axes:  # nobody moves along another axis
            assert len({getattr(mesh.coordinates(rank), axis) for rank in group}) == 1


@given(MESHES)
def test_a_rank_and_its_place_are_each_others_inverse(mesh: Mesh) -> None:
    places = [mesh.coordinates(rank) for rank in range(mesh.size)]
    assert [mesh.rank(*place) for place in places] == list(range(mesh.size))
    assert all(isinstance(place, Coordinates) for place in places)


@pytest.mark.parametrize("axis", ["dp", "pp", "tp"])
@pytest.mark.parametrize("length", [0, -1, 1.0, "2", True, None])
def test_an_axis_that_cannot_be(axis: str, length: object) -> None:
    with pytest.raises(PlanError, match=rf"Mesh\({axis}=\.\.\.\) must be a whole number of ranks from 1; it is"):
        Mesh(**{axis: length})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mesh", "world", "message"),
    [
        (Mesh(dp=2, pp=2), 8, r"2 \* 2 \* 1 = 4, and there are 8. Use dp=4"),
        (Mesh(tp=2), 1, r"1 \* 1 \* 2 = 2, and there are 1. Use a world of 2 ranks"),
        (Mesh(pp=2, tp=2), 6, r"= 4, and there are 6. Use a world of 4 ranks"),
    ],
)
def test_another_world(mesh: Mesh, world: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        mesh.check(world)
    mesh.check(mesh.size)


def test_places_outside() -> None:
    with pytest.raises(PlanError, match="ranks 0 to 3; rank 4"):
        Mesh(dp=4).coordinates(4)
    with pytest.raises(PlanError, match="0 to 0 along tp; 1"):
        Mesh(dp=4).rank(0, 0, 1)
    with pytest.raises(PlanError, match="'dp', 'pp' and 'tp'; 'ep'"):
        Mesh(dp=4).group(0, "ep")  # type: ignore[arg-type]
