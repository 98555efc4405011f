"""Held-out data: the part a sample is in follows from its key alone."""

import numpy as np
import pytest

from hvdscale.data import ShardPlan, split
from hvdscale.errors import PlanError

KEYS = tuple(f"file-{i}.txt" for i in range(5000))


def test_parts_are_a_partition_in_proportion() -> None:
    parts = split(KEYS, (0.8, 0.15, 0.05))
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(5000))
    for part, share in zip(parts, (0.8, 0.15, 0.05), strict=True):
        assert abs(len(part) / 5000 - share) < 0.03
        assert (np.diff(part) > 0).all()


def test_a_key_stays_in_its_part_as_the_data_grows() -> None:
    small = {KEYS[i] for i in split(KEYS[:700], (0.9, 0.1))[1]}
    large = {KEYS[i] for i in split(KEYS, (0.9, 0.1))[1]}
    assert small == large & set(KEYS[:700])


def test_no_group_is_on_two_sides() -> None:
    groups = np.repeat(np.arange(400), 5)
    train, held_out = split(groups, (0.5, 0.5))
    assert not set(groups[train]) & set(groups[held_out])


def test_another_salt_is_another_split_and_none_follows_the_shards() -> None:
    one, two = (set(split(KEYS, (0.5, 0.5), salt=s)[1]) for s in ("a", "b"))
    assert 0.45 < len(one & two) / len(one) < 0.55
    owners = ShardPlan(5000, 2, "hash", keys=KEYS).owner(sorted(one))
    assert 0.45 < owners.mean() < 0.55


@pytest.mark.parametrize("whole", [(1.0, 0.0), (1.0,)])
def test_a_whole_part_takes_everything(whole: tuple[float, ...]) -> None:
    assert len(split(KEYS, whole)[0]) == 5000


def test_a_salt_is_text_or_a_number() -> None:
    assert not np.array_equal(split(KEYS, (0.5, 0.5), "\udcff")[0], split(KEYS, (0.5, 0.5), 255)[0])
    one, same, other = (split(KEYS, (0.5, 0.5), salt)[0].tolist() for salt in (1, "1", 2))
    assert one == same != other, "a salt counts by its text"
    with pytest.raises(PlanError, match=r"salt is a str or an integer; it is 1\.5"):
        split(KEYS, (0.5, 0.5), 1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("fractions", [0.5, "01", ("a", 1), None, {0.9, 0.1}, ("0.5", "0.5")])
def test_fractions_that_are_no_numbers_are_refused(fractions: object) -> None:
    with pytest.raises(PlanError, match=r"one number per part, such as .* they are"):
        split(KEYS, fractions)  # type: ignore[arg-type]


@pytest.mark.parametrize("fractions", [(), (0.5, 0.4), (1.2, -0.2), (float("nan"), 1.0)])
def test_fractions_that_are_no_parts_of_one_are_refused(fractions: tuple[float, ...]) -> None:
    with pytest.raises(PlanError, match="sum to 1; these are"):
        split(KEYS, fractions)
