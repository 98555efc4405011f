"""Nested values, their micro-batches, and whether a loss is a mean, with NumPy as the framework."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hvdscale.errors import PlanError
from hvdscale.model.batch import claim_of, shares_of
from hvdscale.model.mean_check import mean_error
from hvdscale.model.nests import Nests, Plain
from hvdscale.model.seeds import seed_of

NESTS: Nests[Any] = Nests(
    np.ndarray, lambda a: str(a.dtype), {"c": Plain(complex, lambda c: [c.real, c.imag], lambda p: complex(*p))}
)
X = np.arange(12.0).reshape(6, 2)


def test_what_is_packed_comes_back() -> None:
    value = {"a": [X, None, (1, "two", 3.0, True)], "b": {"c": X[:2], "d": 1 + 2j}}
    tensors: list[Any] = []
    packed = NESTS.pack(value, tensors)
    assert [t.shape for t in tensors] == [(6, 2), (2, 2)]
    back = NESTS.unpack(packed, [t + 1 for t in tensors])
    assert back["a"][1:] == [None, (1, "two", 3.0, True)]
    assert back["b"]["d"] == 1 + 2j
    np.testing.assert_array_equal(back["a"][0], X + 1)
    np.testing.assert_array_equal(back["b"]["c"], X[:2] + 1)
    with pytest.raises(PlanError, match="a set would have to cross"):
        NESTS.pack({"a": {1}}, [])


def test_batches_are_measured_and_cut() -> None:
    value = {"x": X, "more": (X[:, 0], "text")}
    assert NESTS.rows(value) == 6
    assert NESTS.rows([X, X[:2]]) == -1
    assert NESTS.rows(np.array(1.0)) == -1
    assert NESTS.rows("nothing") == 0
    assert NESTS.rows(NESTS.select(value, slice(1, 4))) == 3
    assert NESTS.text(value) == "{x: float64[6, 2], more: (float64[6], 'text')}"


@pytest.mark.parametrize(
    ("x", "y", "samples", "error"),
    [
        (X, X, 6, ""),
        (None, X, 6, ""),
        (X, X[:5], 6, "they have 6 and 5"),
        ([X, X[:5]], X, 6, "the tensors of x have one first dimension"),
    ],
)
def test_what_a_rank_claims_of_a_batch(x: Any, y: Any, samples: int, error: str) -> None:
    claim = claim_of("train", x, y, 8.0, NESTS)
    assert (claim.does, claim.samples) == ("train with loss_scale=8", samples)
    assert bool(claim.error) == bool(error)
    assert error in claim.error


def test_shares_of_micro_batches_add_up() -> None:
    assert shares_of([X, X[:3]], NESTS.rows) == [6 / 9, 3 / 9]
    assert shares_of([X, X], lambda y: 0) == [0.5, 0.5]


LOSSES: dict[str, tuple[Any, str]] = {
    "mean": (lambda o, t: np.mean((o - t) ** 2), ""),
    "sum": (lambda o, t: np.sum((o - t) ** 2), "for the same samples twice"),
    "one for each": (lambda o, t: (o - t) ** 2, "it returned a tensor of shape [6, 2]"),
    "nothing": (lambda o, t: None, "it returned a NoneType"),
    "a mean over fewer": (lambda o, t: np.mean((o - t)[t > 4] ** 2), "count=lambda y"),
    "not finite": (lambda o, t: np.mean((o - t) ** 2) * np.inf, ""),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_seen_to_be_a_mean(name: str) -> None:
    loss, message = LOSSES[name]
    as_array = lambda o, t: None if loss(o, t) is None else np.asarray(loss(o, t))  # noqa: E731
    found = mean_error(as_array, NESTS.rows, X * 2, X, NESTS, lambda a: np.concatenate([a, a]))
    assert (message in found) if message else not found


def test_a_mean_over_fewer_is_one_where_they_are_counted() -> None:
    loss = lambda o, t: np.asarray(np.mean((o - t)[t > 4] ** 2))  # noqa: E731
    assert not mean_error(loss, lambda t: (t > 4).sum(), X * 2, X, NESTS, lambda a: np.concatenate([a, a]))


def test_seeds_differ_by_place_and_fit_in_their_bits() -> None:
    places = [(1, 2, 3), (1, 3, 2), (12, 3), (1, 2, 3, 0)]
    assert len({seed_of(*place) for place in places}) == len(places)
    assert all(0 <= seed_of(*place, bits=31) < 2**31 for place in places)
    assert seed_of(1, 2, 3) == seed_of(1, 2, 3)
