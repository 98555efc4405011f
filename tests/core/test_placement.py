"""Promises of a placement: every element has one owner, shares are equal, and an update in pieces is the whole one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from hvdscale.errors import PlanError
from hvdscale.sync import EveryStep, Reduction
from hvdscale.update import Placement, check_elementwise, place
from tests.relaxed_oracle import Adam, Momentum

SIZES = {
    "uneven": [7, 1, 30, 12, 5],
    "fewer elements than ranks": [1, 1],
    "one large tensor": [1000],
    "empty ones": [0, 3, 0, 5],
    "nothing": [],
}


def placed(update: Any, sizes: list[int], ranks: int, elements: int = 20, kinds: Any = None) -> Placement:
    positions = [2 * i + 1 for i in range(len(sizes))]  # frozen tensors lie between
    return place(update, positions, sizes, kinds or ["float32"] * len(sizes), ranks, elements)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("update", ["sharded", "central"])
@pytest.mark.parametrize("case", SIZES)
def test_every_element_has_one_owner(update: str, case: str, ranks: int) -> None:
    sizes = SIZES[case]
    placement = placed(update, sizes, ranks)
    owners = {2 * i + 1: np.zeros(size, int) for i, size in enumerate(sizes)}
    for rank in range(ranks):
        for piece in placement.pieces(rank):
            owners[piece.tensor][piece.start : piece.stop] += 1
            assert update == "sharded" or rank == 0
    assert all((count == 1).all() for count in owners.values())


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_shares_are_equal_up_to_padding(ranks: int) -> None:
    sizes = [7, 1, 30, 12, 5]
    placement = placed("sharded", sizes, ranks)
    held = [sum(piece.size for piece in placement.pieces(rank)) for rank in range(ranks)]
    assert max(held) <= math.ceil(sum(sizes) / ranks) + len(placement.buckets)
    for bucket in placement.buckets:
        assert len(set(bucket.shares)) == 1
        assert 0 <= bucket.size - sum(bucket.sizes) < ranks


@pytest.mark.parametrize("update", ["sharded", "central"])
def test_messages_go_evenly_into_ranks(update: str) -> None:
    """A reduce-scatter is part of both."""
    for bucket in placed(update, SIZES["uneven"], 4).buckets:
        assert bucket.size % 4 == 0
        assert bucket.places()[-1].stop <= bucket.size


def test_buckets_hold_neighbours_of_one_kind_up_to_their_size() -> None:
    placement = placed("sharded", [7, 9, 30, 12, 5], 2, kinds=["a", "b", "a", "a", "b"])
    assert [bucket.tensors for bucket in placement.buckets] == [(1,), (3, 9), (5,), (7,)]


@pytest.mark.parametrize("inner", [Momentum, lambda: Momentum(mu=0.9), Adam], ids=["sgd", "momentum", "adam"])
@pytest.mark.parametrize("update", ["sharded", "central"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_updating_in_pieces_is_updating_the_whole(update: str, ranks: int, inner: Any) -> None:
    """All ranks in one loop: reduce to shares, step on pieces, spread; float64, and equal to the last bit."""
    rng = np.random.default_rng(5)
    sizes = SIZES["uneven"]
    placement = placed(update, sizes, ranks)
    whole = [rng.normal(size=size) for size in sizes]
    pieced = [w.copy() for w in whole]
    optimizers = [inner() for _ in sizes]
    twins = {(rank, piece): inner() for rank in range(ranks) for piece in placement.pieces(rank)}
    for _ in range(4):
        gradients = [rng.normal(size=size) for size in sizes]
        whole = [o.step(w, g) for o, w, g in zip(optimizers, whole, gradients, strict=True)]
        for bucket in placement.buckets:
            message = np.zeros(bucket.size)
            for tensor, at in zip(bucket.tensors, bucket.places(), strict=True):
                message[at] = gradients[tensor // 2]
            shares = np.split(message, np.cumsum(bucket.shares)[:-1])
            updated = [np.zeros_like(share) for share in shares]
            for rank, share in enumerate(shares):
                for piece in bucket.pieces(rank):
                    weights = pieced[piece.tensor // 2][piece.start : piece.stop]
                    updated[rank][piece.place] = twins[rank, piece].step(weights, share[piece.place])
            spread = np.concatenate(updated)
            for tensor, at in zip(bucket.tensors, bucket.places(), strict=True):
                pieced[tensor // 2] = spread[at].copy()
    for a, b in zip(whole, pieced, strict=True):
        np.testing.assert_array_equal(a, b)


def sign_descent(tensors: list[Any], gradients: list[list[Any]]) -> list[Any]:
    return [t - 0.1 * sum(np.sign(g[i]) for g in gradients) for i, t in enumerate(tensors)]


def normalised(tensors: list[Any], gradients: list[list[Any]]) -> list[Any]:
    return [t - 0.1 * sum(g[i] / np.linalg.norm(g[i]) for g in gradients) for i, t in enumerate(tensors)]


def rows(tensors: list[Any], gradients: list[list[Any]]) -> list[Any]:
    return [t - sum(g[i].mean(axis=1, keepdims=True) for g in gradients) for i, t in enumerate(tensors)]


def test_an_unknown_optimizer_is_tried_on_slices() -> None:
    check_elementwise("Signs", "sharded", frozenset(), {}, sign_descent)
    with pytest.raises(PlanError, match=r"Normalised does not: on slices its weights differ by .*e-0"):
        check_elementwise("Normalised", "sharded", frozenset(), {}, normalised)
    with pytest.raises(PlanError, match="Rows does not: a trial on slices ended in AxisError"):
        check_elementwise("Rows", "sharded", frozenset(), {}, rows)


def test_a_known_optimizer_is_not_tried_and_a_refused_one_is_named() -> None:
    check_elementwise("Normalised", "sharded", frozenset({"Normalised"}), {}, normalised)
    with pytest.raises(PlanError, match=r'Muon does not: it turns whole matrices. Use .* update="local"'):
        check_elementwise("Muon", "sharded", frozenset(), {"Muon": "it turns whole matrices"}, sign_descent)


def test_plans_that_cannot_be() -> None:
    with pytest.raises(PlanError, match=r'takes "local", "central" or "sharded", got \'everywhere\''):
        EveryStep(update="everywhere")
    with pytest.raises(PlanError, match="op=Adasum"):
        EveryStep("sharded").check(Reduction(op="adasum"))
    with pytest.raises(PlanError, match="groups=2"):
        EveryStep("central").check(Reduction(groups=2))
    EveryStep().check(Reduction(op="adasum", groups=2))
    with pytest.raises(PlanError, match='"central" or "sharded"'):
        placed("local", [1], 2)
