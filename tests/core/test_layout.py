"""A model cut for any mesh and joined again, by way of any other mesh, is the same to the bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdscale.errors import PlanError, StateError
from hvdscale.model.layout import Layout, Placement, Split, reshard
from hvdscale.model.mesh import Mesh

MESHES = st.builds(Mesh, dp=st.integers(1, 2), pp=st.integers(1, 3), tp=st.integers(1, 4))


@st.composite
def models(draw: st.DrawFn) -> list[tuple[tuple[int, ...], Split | None]]:
    """Shapes, and how they may be split."""
    parameters = []
    for _ in range(draw(st.integers(1, 4))):
        sections, grain, units = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(4, 7))
        axis = draw(st.integers(0, 2))
        shape = [draw(st.integers(1, 3)) for _ in range(draw(st.integers(axis + 1, 3)))]
        shape[axis] = sections * grain * units
        parameters.append((tuple(shape), Split(axis, sections, grain) if draw(st.booleans()) else None))
    parameters.append(((), None))  # a counter
    return parameters


def place(model: list[tuple[tuple[int, ...], Split | None]], mesh: Mesh) -> Layout:
    """Round the stages; the first parameter is tied to the last stage, too."""
    stages = [(i % mesh.pp,) for i in range(len(model))]
    stages[0] = tuple(dict.fromkeys((0, mesh.pp - 1)))
    placements = [
        Placement(f"p{i}", shape, stages=stages[i], split=split if mesh.tp > 1 else None)
        for i, (shape, split) in enumerate(model)
    ]
    return Layout(mesh, tuple(placements))


def numbered(layout: Layout) -> dict[str, np.ndarray]:
    return {p.name: np.arange(np.prod(p.shape), dtype=np.int32).reshape(p.shape) for p in layout.placements}


def parts_of(layout: Layout, whole: dict[str, np.ndarray]) -> dict[int, dict[str, np.ndarray]]:
    return {rank: layout.cut_all(whole, rank) for rank in range(layout.mesh.size)}


@settings(max_examples=40, deadline=None)
@given(models(), MESHES, MESHES)
def test_whole_to_any_mesh_to_any_other_to_whole(model: list, first: Mesh, second: Mesh) -> None:
    one, two = place(model, first), place(model, second)
    whole = numbered(one)
    parts = parts_of(one, whole)
    moved = {rank: reshard(parts, one, two, rank) for rank in range(second.size)}
    for rank, held in moved.items():
        assert {n: a.shape for n, a in held.items()} == {
            n: two.local_shape(n, rank) for n in two.names if two.holds(n, rank)
        }
        assert sum(a.size for a in held.values()) == two.elements(rank)
    for name, array in two.join_all(moved).items():
        assert array.dtype == whole[name].dtype
        np.testing.assert_array_equal(array, whole[name])


@settings(max_examples=40, deadline=None)
@given(models(), MESHES)
def test_parts_that_speak_are_the_model_exactly_once(model: list, mesh: Mesh) -> None:
    layout = place(model, mesh)
    whole = numbered(layout)
    parts = parts_of(layout, whole)
    for dp in range(mesh.dp):
        copy = [rank for rank in range(mesh.size) if mesh.coordinates(rank).dp == dp]
        for name in layout.names:
            speakers = [rank for rank in copy if layout.speaks(name, rank)]
            assert sorted(layout.speakers(name, dp)) == speakers
            said = np.concatenate([parts[rank][name].ravel() for rank in speakers])
            assert sorted(said) == sorted(whole[name].ravel())


@pytest.mark.parametrize(
    ("split", "length", "parts", "spans"),
    [
        (Split(0), 8, 2, [[(0, 4)], [(4, 8)]]),
        (Split(0), 7, 3, [[(0, 3)], [(3, 5)], [(5, 7)]]),  # as even as can be
        (Split(0, grain=4), 12, 2, [[(0, 8)], [(8, 12)]]),  # three heads of four features
        (Split(0, sections=3, grain=2), 12, 2, [[(0, 2), (4, 6), (8, 10)], [(2, 4), (6, 8), (10, 12)]]),
    ],
)
def test_spans(split: Split, length: int, parts: int, spans: list) -> None:
    assert [list(split.spans(length, parts, part)) for part in range(parts)] == spans


@pytest.mark.parametrize(
    ("shape", "split", "message"),
    [
        ((3, 5), Split(0), r"w, shape \[3, 5\]: an axis of 3 cannot be divided over tp=4 ranks.*Use tp=3 or less"),
        ((12,), Split(0, grain=4), r"3 groups of 4 \(heads, say\) cannot be divided over tp=4"),
        ((10,), Split(0, sections=3), "An axis of 10 cannot be divided into 3 sections"),
        ((4,), Split(1), r"w has shape \[4\] and no axis 1"),
    ],
)
def test_an_axis_that_cannot_be_divided(shape: tuple[int, ...], split: Split, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Layout(Mesh(tp=4), (Placement("w", shape, split=split),))


def test_states_that_do_not_fit() -> None:
    layout = Layout(Mesh(tp=2), (Placement("w", (4, 2), split=Split(0)), Placement("b", (4,))))
    whole = numbered(layout)
    with pytest.raises(StateError, match=r"1 are missing \(b\) and 1 are unknown \(c\)"):
        layout.cut_all({"w": whole["w"], "c": whole["b"]}, 0)
    with pytest.raises(StateError, match=r"w has shape \[4, 2\] in the whole model; an array of \[2, 4\] came"):
        layout.cut("w", whole["w"].T, 0)
    with pytest.raises(StateError, match=r"w lies on ranks \[0, 1\]; the part of rank 1 is missing"):
        layout.join("w", {0: layout.cut("w", whole["w"], 0)})
    with pytest.raises(StateError, match=r"w on rank 1 has shape \[2, 2\]; \[4, 2\] came"):
        layout.join("w", {0: layout.cut("w", whole["w"], 0), 1: whole["w"]})
    with pytest.raises(StateError, match="The model has no 'v'"):
        layout.holds("v", 0)
    with pytest.raises(PlanError, match="'w' appears twice"):
        Layout(Mesh(), (Placement("w", ()), Placement("w", ())))
    with pytest.raises(PlanError, match=r"w is on stages \(1,\); the mesh has pp=1"):
        Layout(Mesh(), (Placement("w", (), stages=(1,)),))
