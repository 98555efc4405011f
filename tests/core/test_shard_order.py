"""The random order passes the tests a true shuffle passes; poor permutations fail the same tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from hvdscale.data import permutation
from hvdscale.data.permutation import Permutation

N = 20_011
ORDERS = 12  # orders put together in one test

Orders = Callable[[int], np.ndarray]


def ours(epoch: int) -> np.ndarray:
    return Permutation(N, (3, epoch))(np.arange(N))


def shuffled(epoch: int) -> np.ndarray:
    return np.random.default_rng(epoch).permutation(N)


def affine(epoch: int) -> np.ndarray:
    factor, offset = np.random.default_rng(epoch).integers(1, N, 2)  # N is prime
    return (np.arange(N) * factor + offset) % N


def two_rounds(epoch: int) -> np.ndarray:
    order = Permutation(N, (3, epoch))
    object.__setattr__(order, "_keys", order._keys[:2])
    return order(np.arange(N))


def rotated(epoch: int) -> np.ndarray:
    return np.roll(np.arange(N), int(np.random.default_rng(epoch).integers(N)))


def seeds_that_alias(epoch: int) -> np.ndarray:
    return shuffled(epoch // 2)


def chi_squared(counts: np.ndarray) -> float:
    """In standard deviations from what even counts would give; a true shuffle stays within about 4."""
    expected = counts.sum() / counts.size
    free = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - free) / np.sqrt(2 * free))


def positions(orders: Orders) -> float:
    """Where in the order the samples of each stretch of the source come."""
    where = np.concatenate([np.stack([np.arange(N), orders(e)], 1) for e in range(ORDERS)])
    return chi_squared(np.histogram2d(where[:, 0], where[:, 1], bins=64)[0])


def adjacent_pairs(orders: Orders) -> float:
    """How far apart in the source the samples of neighbouring positions are, around the end."""
    gaps = np.concatenate([np.diff(orders(e)) % N for e in range(ORDERS)])
    return chi_squared(np.bincount(gaps * 512 // N, minlength=512))


def displacement(orders: Orders) -> float:
    """How far samples are moved from their place in the source, around the end."""
    moved = np.concatenate([(orders(e) - np.arange(N)) % N for e in range(ORDERS)])
    return chi_squared(np.bincount(moved * 512 // N, minlength=512))


def two_epochs(orders: Orders) -> float:
    """How far apart a sample's positions are in epochs that follow each other."""
    moved = np.concatenate([(orders(e) - orders(e + 1)) % N for e in range(ORDERS)])
    return chi_squared(np.bincount(moved * 512 // N, minlength=512))


TESTS = (positions, adjacent_pairs, displacement, two_epochs)


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("orders", [ours, shuffled])
def test_a_good_order_passes(orders: Orders, test: Callable[[Orders], float]) -> None:
    assert abs(test(orders)) < 5


@pytest.mark.parametrize(
    ("orders", "test"),
    [
        (affine, adjacent_pairs),
        (two_rounds, positions),
        (two_rounds, adjacent_pairs),
        (rotated, positions),
        (rotated, displacement),
        (seeds_that_alias, two_epochs),
    ],
)
def test_a_poor_order_fails(orders: Orders, test: Callable[[Orders], float]) -> None:
    assert abs(test(orders)) > 20


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_every_order_of_a_few_is_about_as_likely(n: int) -> None:
    orders = int(np.prod(np.arange(1, n + 1)))
    counts = Counter(tuple(Permutation(n, (7, epoch))(np.arange(n))) for epoch in range(12 * orders))
    assert len(counts) == orders
    assert abs(chi_squared(np.array(list(counts.values())))) < 5


@pytest.mark.parametrize("n", [1, 2, 3, 255, 4095, 4096, 4097, 65535, 65536, 65537, 2**31, 2**31 + 1, 2**40, 2**62])
def test_the_inverse_finds_every_position_at_any_size(n: int) -> None:
    order = Permutation(n, (1,))
    at = np.unique(np.linspace(0, n - 1, 3000).astype(np.int64).clip(0, n - 1))
    samples = order(at)
    assert np.array_equal(order.inverse(samples), at)
    assert samples.min() >= 0
    assert samples.max() < n
    assert len(np.unique(samples)) == len(at)


@pytest.mark.parametrize("n", [4**j + d for j in range(1, 10) for d in (-1, 0, 1)])
def test_each_sample_comes_once(n: int) -> None:
    assert (np.bincount(Permutation(n, (5,))(np.arange(n)), minlength=n) == 1).all()


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Permutation(5000, (2,))(np.arange(5000))
    monkeypatch.setattr(permutation, "_BLOCK", 7)
    assert np.array_equal(Permutation(5000, (2,))(np.arange(5000)), whole)


def test_wide_words_shuffle_as_well_as_narrow_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permutation, "_NARROW", permutation._WIDE)
    for test in TESTS:
        assert abs(test(ours)) < 5


def test_names_never_alias() -> None:
    names = [(seed, epoch) for seed in (0, 1, 2, 12, 123) for epoch in (0, 1, 3, 23)]
    assert len({tuple(Permutation(64, name)(np.arange(64))) for name in names}) == len(names)
