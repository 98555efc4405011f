"""ShardStream: every record to exactly one shard, over stops and restarts with any number of ranks."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdscale.data import ShardPlan, ShardStream
from hvdscale.data.stream_feed import StreamFeed
from hvdscale.data.stream_past import Run
from hvdscale.errors import PlanError, StateError

# stream-v1: the numbers of the first 20 records by shard, seed 5, windows of 8.
GOLDEN = {
    "random": [[6, 2, 0, 13, 14, 15, 18], [5, 4, 7, 9, 8, 16], [3, 1, 10, 12, 11, 17, 19]],
    "hash": [[1, 2, 4, 6, 8, 9, 11, 13, 15, 16, 18], [5, 12, 19], [0, 3, 7, 10, 14, 17]],
}
POLICIES = ("ordered", "random", "hash")


def key(record: str) -> str:
    return record.split("#")[0]


def records(n: int, keys: int = 40) -> list[str]:
    return [f"{i * 11 % keys}#{i}" for i in range(n)]


def source(data: list[Any]) -> Callable[[int], Iterator[Any]]:
    return lambda start: itertools.islice(iter(data), start, None)


def stream(policy: str, shards: int, window: int = 32, **more: Any) -> ShardStream:
    own = {"ordered": {}, "random": {"window": window}, "hash": {"key": key}}[policy]
    return ShardStream(shards, policy, **own, **more)


def read(of: ShardStream, data: list[Any], batch_size: int = 5) -> list[list[Any]]:
    """The records of each shard, to the end."""
    readers = [of.reader(source(data), shard, batch_size) for shard in range(of.shards)]
    return [[record for batch in reader for record in batch] for reader in readers]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 700),
    shards=st.integers(1, 9),
    policy=st.sampled_from(POLICIES),
    window=st.integers(1, 300),
    seed=st.integers(0, 2**70),
)
def test_every_record_goes_to_exactly_one_shard(n: int, shards: int, policy: str, window: int, seed: int) -> None:
    data = records(n)
    got = read(stream(policy, shards, window, seed=seed), data)
    assert sorted(itertools.chain(*got)) == sorted(data)


run_plan = st.tuples(st.integers(1, 8), st.integers(1, 17), st.lists(st.integers(0, 6), min_size=8, max_size=8))


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(0, 500),
    policy=st.sampled_from(POLICIES),
    window=st.integers(1, 120),
    runs=st.lists(run_plan, min_size=1, max_size=5),
)
def test_exactly_once_over_stops_at_any_batch_with_any_number_of_ranks(
    n: int, policy: str, window: int, runs: list[tuple[int, int, list[int]]]
) -> None:
    """Each run: so many shards, so large batches, and how many batches each shard delivers before the stop."""
    data, delivered = records(n), []
    now = stream(policy, runs[0][0], window)
    for i, (shards, batch_size, batches) in enumerate(runs):
        readers = [now.reader(source(data), shard, batch_size) for shard in range(shards)]
        for reader, count in zip(readers, batches, strict=False):
            for batch in itertools.islice(reader, count):
                delivered += batch
        states = json.loads(json.dumps([reader.state_dict() for reader in reversed(readers)]))
        now = stream(policy, 1, window).resume(states, runs[i + 1][0] if i + 1 < len(runs) else 3)
        if now.epoch == 1:  # all shards had come to the end
            break
    rest = read(now, data) if now.epoch == 0 else []
    assert Counter([*delivered, *itertools.chain(*rest)]) == Counter(data)


def test_a_forgotten_batch_would_be_seen() -> None:
    """The check above is worth something: a state that says one record more loses that record."""
    data, of = records(100), stream("ordered", 2)
    readers = [of.reader(source(data), shard, 5) for shard in range(2)]
    first = [next(reader) for reader in readers]
    states = [reader.state_dict() for reader in readers]
    states[0]["reached"] += 2
    everything = [*itertools.chain(*first), *itertools.chain(*read(of.resume(states, 3), data))]
    assert sorted(set(data) - set(everything)) == [data[10]]


class TestOrdered:
    def test_record_i_goes_to_shard_i_mod_k(self) -> None:
        assert read(stream("ordered", 3), list(range(8))) == [[0, 3, 6], [1, 4, 7], [2, 5]]

    def test_records_are_passed_on_as_they_come(self) -> None:
        seen = []

        def live(start: int) -> Iterator[int]:
            for i in itertools.count(start):
                seen.append(i)
                yield i

        reader = ShardStream(2).reader(live, 1, 3)
        assert next(reader) == [1, 3, 5]
        assert len(seen) == 6, "waits for no record beyond its batch"


class TestRandom:
    def test_records_stay_in_their_windows(self) -> None:
        got = read(stream("random", 1, window=10), list(range(35)))[0]
        assert [sorted(got[i : i + 10]) for i in range(0, 35, 10)] == [
            list(range(i, min(i + 10, 35))) for i in range(0, 35, 10)
        ]

    def test_windows_epochs_and_seeds_each_have_their_own_order(self) -> None:
        windows = [
            np.array(read(stream("random", 1, 50, seed=seed, epoch=epoch), list(range(200)))[0]).reshape(4, 50) % 50
            for seed in (0, 1, 2)
            for epoch in (0, 1, 2)
        ]
        assert len({tuple(order) for order in np.concatenate(windows).tolist()}) == 3 * 3 * 4

    def test_a_step_of_all_ranks_is_the_same_for_every_number_of_ranks(self) -> None:
        data = list(range(240))
        alone = np.array(read(stream("random", 1, 60, seed=2), data)[0]).reshape(-1, 12)
        for shards in (2, 3, 4, 6):
            got = read(stream("random", shards, 60, seed=2), data)
            steps = np.concatenate([np.array(g).reshape(-1, 12 // shards) for g in got], axis=1)
            assert np.array_equal(np.sort(steps, axis=1), np.sort(alone, axis=1))

    def test_every_place_in_the_window_is_as_likely(self) -> None:
        """Chi-squared over 16 places of 1,500 windows; the 1e-6 quantile at 15 degrees of freedom is 56.5."""
        window, windows = 16, 1500
        got = np.array(read(stream("random", 1, window), list(range(window * windows)))[0]).reshape(windows, window)
        for place in (0, 7, 15):
            counts = np.bincount(got[:, place] % window, minlength=window)
            assert ((counts - windows / window) ** 2 / (windows / window)).sum() < 56.5

    def test_resume_rereads_the_window_only(self) -> None:
        data, of = list(range(1000)), stream("random", 2, 100)
        readers = [of.reader(source(data), shard, 5) for shard in range(2)]
        for reader in readers:
            list(itertools.islice(reader, 37))  # 370 records: in the fourth window
        starts = []
        again = of.resume([reader.state_dict() for reader in readers], 3)
        reader = again.reader(lambda start: starts.append(start) or data[start:], 0, 5)
        next(reader)
        assert starts == [300]


class TestHash:
    def test_equal_keys_share_a_shard_whatever_the_order(self) -> None:
        data = records(500)
        one, other = (read(stream("hash", 5), some) for some in (data, data[::-1]))
        for got, mirrored in zip(one, other, strict=True):
            assert sorted(got) == sorted(mirrored)
        homes = Counter(key(record) for got in one for record in {key(r): r for r in got}.values())
        assert set(homes.values()) == {1}

    def test_keys_share_the_shard_they_have_in_a_plan(self) -> None:
        data = records(500)
        plan = ShardPlan(500, 5, "hash", keys=[key(record) for record in data], seed=7)
        for shard, got in enumerate(read(stream("hash", 5, seed=7), data)):
            assert got == [data[i] for i in plan.indices(shard)]

    def test_source_order_is_kept(self) -> None:
        for got in read(stream("hash", 4), records(300)):
            numbers = [int(record.split("#")[1]) for record in got]
            assert numbers == sorted(numbers)

    def test_keys_that_cannot_be_are_named_by_their_records(self) -> None:
        reader = ShardStream(2, "hash", key=lambda r: r).reader(source([*range(300), 1.5]), 0, 50)
        with pytest.raises(PlanError, match=r"Keys of records 256\.\.300 of the stream: .* key 44 is 1\.5 \(float\)"):
            list(reader)

    def test_keys_are_of_one_kind_however_far_apart(self) -> None:
        reader = ShardStream(1, "hash", key=lambda r: r if r < 600 else str(r)).reader(source(list(range(700))), 0, 50)
        with pytest.raises(PlanError, match=r"Keys of records 512\.\.699 of the stream: .* mix integers and strings"):
            list(reader)

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            (lambda r: r.encode(), "record .* was of strings [0-9a-f]{16} .* and is of bytes"),
            (lambda r: int(r.split("#")[1]), "was of strings [0-9a-f]{16} .* and is of integers"),
            (lambda r: r.split("#")[1], "was of strings [0-9a-f]{16} .* and is of strings"),
        ],
    )
    @pytest.mark.parametrize("batches", [(3, 9), (0, 4), (128, 0)])
    def test_a_stream_goes_on_with_the_keys_it_had(self, other: Any, message: str, batches: tuple[int, int]) -> None:
        """Whichever shards had got anything, also at the border of two blocks of records, and after another stop."""
        data, of = records(1000), ShardStream(2, "hash", key=lambda r: r, seed=3)
        for more in (batches, (1, 0)):
            readers = [of.reader(source(data), shard, 1) for shard in range(2)]
            for reader, count in zip(readers, more, strict=True):
                list(itertools.islice(reader, count))
            states = json.loads(json.dumps([reader.state_dict() for reader in readers]))
            of = of.resume(states, 2)
            wrong = ShardStream(1, "hash", key=other, seed=3).resume(states, 3)
            with pytest.raises(StateError, match=message):
                list(wrong.reader(source(data), 1, 5))
        reader = of.reader(source(data), 0, 5)
        next(reader)
        with pytest.raises(StateError, match=message):
            list(dataclasses.replace(of, key=other).reader(source(data), 0, 5, after=reader.state_dict()))

    def test_states_of_before_keys_were_kept_are_read(self) -> None:
        data, of = records(300), stream("hash", 2)
        readers = [of.reader(source(data), shard, 7) for shard in range(2)]
        got = [next(reader) for reader in readers]
        states = [{k: v for k, v in reader.state_dict().items() if k != "key"} for reader in readers]
        rest = read(of.resume(states, 3), data)
        assert sorted(itertools.chain(*got, *rest)) == sorted(data)


@pytest.mark.parametrize("policy", POLICIES)
class TestReaders:
    def test_batches_are_full_but_the_last(self, policy: str) -> None:
        for shard in range(3):
            sizes = [len(batch) for batch in stream(policy, 3).reader(source(records(200)), shard, 8)]
            assert set(sizes[:-1]) == {8}
            assert 1 <= sizes[-1] <= 8

    def test_the_state_counts_what_was_delivered(self, policy: str) -> None:
        reader = stream(policy, 2).reader(source(records(100)), 0, 4)
        counts = [reader.state_dict()["batches"]]
        for _ in itertools.islice(reader, 3):
            counts.append(reader.state_dict()["batches"])
        assert counts == [0, 1, 2, 3]

    def test_workers_of_a_shard_take_turns(self, policy: str) -> None:
        of, data = stream(policy, 2), records(200)
        alone = list(of.reader(source(data), 1, 4))
        workers = [list(of.reader(source(data), 1, 4, every=3, first=first)) for first in range(3)]
        assert [batch for turn in itertools.zip_longest(*workers) for batch in turn if batch] == alone

    def test_a_shard_goes_on_behind_a_state_of_its_own(self, policy: str) -> None:
        of, data = stream(policy, 2), records(200)
        alone = list(of.reader(source(data), 1, 4))
        stopped = of.reader(source(data), 1, 4)
        list(itertools.islice(stopped, 7))
        again = of.reader(source(data), 1, 4, after=stopped.state_dict())
        assert list(again) == alone[7:]
        assert again.state_dict()["batches"] == len(alone)
        with pytest.raises(StateError, match="its shard is 1, that of this stream 0"):
            of.reader(source(data), 0, 4, after=stopped.state_dict())

    def test_the_next_epoch_starts_over(self, policy: str) -> None:
        of, data = stream(policy, 2), records(100)
        readers = [of.reader(source(data), shard, 4) for shard in range(2)]
        next(readers[0])
        resumed = of.resume([reader.state_dict() for reader in readers], 2)
        assert len(list(itertools.chain(*read(resumed, data)))) == 96
        assert sorted(itertools.chain(*read(resumed.next_epoch(), data))) == sorted(data)

    def test_a_rank_may_be_in_the_next_pass_where_all_others_have_ended_theirs(self, policy: str) -> None:
        of, data = stream(policy, 3), records(100)
        cursors = [StreamFeed(source(data), of, shard, 4) for shard in range(3)]
        for cursor in cursors:
            for _ in cursor.batches():
                cursor.deliver()
        cursors[0].finish()
        next(cursors[0].batches())
        got = cursors[0].deliver()
        cursors[1].finish()
        behind = StreamFeed(source(data), of, 2, 4)
        with pytest.raises(StateError, match="no rank has begun the next pass before another ended this one"):
            of.resume([cursor.state_dict() for cursor in (*cursors[:2], behind)], 2)
        cursors[2].finish()
        resumed = of.resume([cursor.state_dict() for cursor in cursors], 2)
        assert resumed.epoch == 1
        assert sorted([*got, *itertools.chain(*read(resumed, data))]) == sorted(data)

    def test_states_say_their_epoch(self, policy: str) -> None:
        of, data = stream(policy, 2, epoch=4), records(100)
        readers = [of.reader(source(data), shard, 4) for shard in range(2)]
        got = [*next(readers[0]), *itertools.chain(*readers[1])]
        rest = stream(policy, 1).resume([reader.state_dict() for reader in readers], 3)
        assert rest.epoch == 4
        assert sorted([*got, *itertools.chain(*read(rest, data))]) == sorted(data)
        list(readers[0])
        after = stream(policy, 1).resume([reader.state_dict() for reader in readers], 3)
        assert (after.epoch, after.past) == (5, ()), "all had come to the end"

    def test_the_description_says_what_cannot_be(self, policy: str) -> None:
        text = stream(policy, 2).describe()
        assert "Not promised: an exact partition of a stream that differs between ranks" in text
        assert {"ordered": "one record at most", "random": "no record leaves its window", "hash": "skew"}[
            policy
        ] in text


@pytest.mark.parametrize("policy", ["ordered", "random"])
def test_a_state_stays_small(policy: str) -> None:
    """Twenty restarts of ranks in step leave no more behind than the last two of them."""
    of, data = stream(policy, 4), records(4000)
    for shards in [3, 4] * 10:
        readers = [of.reader(source(data), shard, 4) for shard in range(of.shards)]
        for reader in readers:
            list(itertools.islice(reader, 5))
        of = of.resume([reader.state_dict() for reader in readers], shards)
    assert len(of.past) <= 2


def test_what_earlier_runs_read_is_asked_for_only_as_far_as_they_had_come() -> None:
    asked: list[int] = []

    class Heard(Run):
        def delivered(self, positions: Any, owners: Any) -> Any:
            asked.append(int(positions.min()))
            return super().delivered(positions, owners)

    of = ShardStream(2, past=(Heard((300, 5)),))
    assert len(read(of, list(range(3000)))[0]) == 1500 - 150
    assert set(asked) == {0, 256}


def test_the_format_does_not_change() -> None:
    got = {policy: read(stream(policy, 3, 8, seed=5), records(20, keys=7)) for policy in ("random", "hash")}
    numbers = {policy: [[int(r.split("#")[1]) for r in shard] for shard in shards] for policy, shards in got.items()}
    assert numbers == GOLDEN


def two_states(policy: str = "ordered", **more: Any) -> list[dict[str, Any]]:
    of = stream(policy, 2, **more)
    readers = [of.reader(source(records(50)), shard, 4) for shard in range(2)]
    for reader in readers:
        next(reader)
    return [reader.state_dict() for reader in readers]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: [], "states of all shards, as a list; there are none"),
        (lambda s: s[:1], r"Each of the 2 shards of the run has one state; these are of shards \[0\]"),
        (lambda s: [s[0], s[0]], r"these are of shards \[0, 0\]"),
        (lambda s: [{**x, "shards": 2**62} for x in s], r"Each of the 4611686018427387904 shards"),
        (lambda s: [*s, s[1]], r"these are of shards \[0, 1, 1\]"),
        (lambda s: [s[0], {**s[1], "shards": 3}], "States are of one run .*'shards': 2.* state 1 of .*'shards': 3"),
        (lambda s: [s[0], {**s[1], "past": [[4]]}], "States are of one run"),
        (lambda s: two_states(seed=1), "its seed is 1, that of this stream 0"),
        (
            lambda s: [s[0], {**s[1], "epoch": 1}],
            "States are of one run and one pass, or of its end; state 0 is of .*'epoch': 0.*'epoch': 1",
        ),
        (lambda s: [s[0], {**s[1], "finished": None}], "State 1 is damaged: .* finished None"),
        (lambda s: two_states("random"), "its policy is 'random', that of this stream 'ordered'"),
        (
            lambda s: [{**x, "format": "stream-v2"} for x in s],
            "its format is 'stream-v2', that of this stream 'stream-v1'",
        ),
        (lambda s: [{}, {}], "State 0 is of another stream: its format is None"),
        (lambda s: [s[0], 7], "state 1 is 7"),
        (lambda s: [{**s[0], "reached": -1}, s[1]], "State 0 is damaged: .*'reached': -1"),
        (lambda s: [{**s[0], "reached": "9"}, s[1]], "State 0 is damaged"),
        (lambda s: [{**s[0], "past": [[]]}, s[1]], "State 0 is damaged"),
        (lambda s: [{**s[0], "reached": 2**63}, s[1]], "State 0 is damaged"),
        (lambda s: [{**x, "past": [[2**63]]} for x in s], "State 0 is damaged"),
        (lambda s: [{**x, "past": [[1] * 65_536]} for x in s], "State 0 is damaged"),
        (lambda s: [{**s[0], "key": 3}, s[1]], "State 0 is damaged: .* key 3"),
    ],
)
def test_states_of_something_else(change: Callable[[list[dict[str, Any]]], list[Any]], message: str) -> None:
    with pytest.raises(StateError, match=message):
        stream("ordered", 2).resume(change(two_states()), 2)


def test_a_state_of_another_window() -> None:
    with pytest.raises(StateError, match="its window is 16, that of this stream 32"):
        stream("random", 2).resume(two_states("random", window=16), 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ShardStream(0), r"shards must be an integer in 1\.\.65535; it is 0"),
        (lambda: ShardStream(2, "sorted"), "policy is one of 'ordered', 'random', 'hash'; it is 'sorted'"),
        (lambda: ShardStream(2, seed=-1), "seed must be an integer from 0; it is -1"),
        (lambda: ShardStream(2, epoch=0.5), "epoch must be an integer from 0; it is 0.5"),
        (lambda: ShardStream(2, "random", window=0), "window must be an integer in 1"),
        (lambda: ShardStream(2, window=9), 'Only policy "random" uses a window; the policy is "ordered"'),
        (lambda: ShardStream(2, "hash"), 'Policy "hash" needs key, a function of a record; it is None'),
        (lambda: ShardStream(2, key=key), 'Only policy "hash" uses key; the policy is "ordered"'),
        (lambda: ShardStream(2).reader(source([]), 2, 1), r"shard must be an integer in 0\.\.1; it is 2"),
        (lambda: ShardStream(2).reader(source([]), 0, 0), r"batch_size must be an integer in 1\.\..*; it is 0"),
        (lambda: ShardStream(2).reader([1], 0, 1), r"source is a function of the record to start at.*it is \[1\]"),
        (lambda: ShardStream(2).reader(source([]), 0, 1, every=2, first=2), r"first must be an integer in 0\.\.1"),
        (
            lambda: next(ShardStream(2).reader(lambda start: None, 0, 1)),
            r"source\(start\) gives the records.*it gave None",
        ),
        (lambda: ShardStream(2, past=[3]), r"past is a tuple; it is \[3\]"),
        (lambda: ShardStream(2, past=(3,)), "A run of the past is a Run; it is 3"),
        (lambda: ShardStream(2).resume(two_states(), 0), "shards must be an integer"),
    ],
)
def test_bad_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        call()


def test_numbers_of_numpy_are_saved_as_json() -> None:
    stream = ShardStream(np.int64(2), seed=np.int64(3), epoch=np.int64(4))
    reader = stream.reader(lambda start: iter(range(start, 9)), np.int64(1), np.int64(2))
    next(reader)
    assert json.loads(json.dumps(reader.state_dict()))["epoch"] == 4
