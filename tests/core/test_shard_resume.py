"""Exactly once: stop anywhere, merge the states, go on with any number of shards, again and again."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdscale.data import Reader, ShardPlan, add_sums
from hvdscale.data.keys import HashedKeys
from hvdscale.errors import StateError

POLICIES = ("ordered", "random", "hash")


class Run:
    """A training run that is stopped and resumed; it notes every sample it was given."""

    def __init__(self, plan: ShardPlan, batch_size: int, keys: list[str] | None = None) -> None:
        self.plan, self.keys = plan, keys
        self.read: dict[int, list[int]] = defaultdict(list)
        self._start(batch_size)

    def _start(self, batch_size: int) -> None:
        self.readers = [self.plan.reader(shard, batch_size) for shard in range(self.plan.shards)]

    def go(self, batches: list[int]) -> None:
        """Each reader delivers this many batches."""
        for reader, count in zip(self.readers, batches, strict=True):
            for batch in itertools.islice(reader, count):
                self.read[batch.epoch] += batch.indices[: batch.count].tolist()

    def resume(self, shards: int, batch_size: int, weights: list[float] | None = None) -> None:
        self._note_dropped(max(reader.epoch for reader in self.readers))
        states = json.loads(json.dumps([reader.state_dict() for reader in self.readers]))
        self.plan = ShardPlan.resume(states[::-1], shards, keys=self.keys, weights=weights)
        self._start(batch_size)

    def resize(self, shards: int, weights: list[float] | None) -> None:
        """Before anything of this plan is read."""
        self.plan, _ = self.plan.resize(shards, weights)
        self._start(self.readers[0].batch_size)

    def _note_dropped(self, before: int) -> None:
        """What tail "drop" left out of the epochs that are over counts as read."""
        for reader in self.readers:
            for epoch in range(self.plan.first_epoch, min(before, reader.epoch)):
                self.read[epoch] += reader.dropped(epoch).tolist()

    def finish(self) -> int:
        """Read all interrupted epochs and one more to their ends; how many epochs that makes."""
        epochs = 2 + max([reader.epoch for reader in self.readers] + [each.epoch for each in self.plan.interrupted])
        for reader in self.readers:
            while reader.epoch < epochs:
                batch = next(reader, None)
                if batch is None:
                    break
                self.read[batch.epoch] += batch.indices[: batch.count].tolist()
        self._note_dropped(epochs)
        return epochs


@settings(max_examples=80, deadline=None)
@given(data=st.data(), policy=st.sampled_from(POLICIES), tail=st.sampled_from(["exact", "pad", "drop"]))
def test_every_sample_of_every_epoch_is_read_once(data: st.DataObject, policy: str, tail: str) -> None:
    n = data.draw(st.integers(300, 330) if tail == "drop" else st.integers(0, 90), "n")
    largest = 2 if tail == "drop" else 9  # "drop" refuses a batch that some shard cannot fill

    def share() -> tuple[int, list[float] | None]:
        shards = data.draw(st.integers(1, 6), "shards")
        weights = st.lists(st.floats(0.5, 2), min_size=shards, max_size=shards)
        return shards, data.draw(st.one_of(st.none(), weights), "weights")

    keyed = policy == "hash" and tail != "drop" and data.draw(st.booleans(), "keys")
    keys = [f"key {i % 40}" for i in range(n)] if keyed else None
    shards, weights = share()
    even = keyed and data.draw(st.booleans(), "even")
    plan = ShardPlan(n, shards, policy, seed=3, tail=tail, keys=keys, weights=weights, even=even)
    run = Run(plan, data.draw(st.integers(1, largest), "batch"), keys)
    for _ in range(data.draw(st.integers(1, 4), "stops")):
        if data.draw(st.booleans(), "resized"):
            run.resize(*share())
        counts = st.lists(st.integers(0, 12), min_size=run.plan.shards, max_size=run.plan.shards)
        run.go(data.draw(counts, "batches"))
        shards, weights = (run.plan.shards, None) if data.draw(st.booleans(), "as many as before") else share()
        run.resume(shards, data.draw(st.integers(1, largest), "batch"), weights)
    first = run.plan.first_epoch
    epochs = run.finish()
    for epoch in range(epochs):
        assert sorted(run.read[epoch]) == list(range(n))
    for epoch in range(first, epochs):
        assert add_sums(reader.certificate(epoch) for reader in run.readers) == run.plan.certificate()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("tail", ["exact", "pad", "drop"])
@pytest.mark.parametrize("stop", [0, 1, 5, 9, 13, 30])
def test_as_many_shards_go_on_as_if_nothing_had_happened(policy: str, tail: str, stop: int) -> None:
    plan = ShardPlan(101, 3, policy, seed=2, tail=tail)
    run, straight = Run(plan, 4), Run(plan, 4)
    for _ in range(2):
        run.go([stop] * 3)
        straight.go([stop] * 3)
        run.resume(3, 4)
    for one, other in zip(run.readers, straight.readers, strict=True):
        for a, b in itertools.islice(zip(one, other, strict=True), 40):
            assert (a.epoch, a.indices.tolist(), a.count) == (b.epoch, b.indices.tolist(), b.count)


@pytest.mark.parametrize(("shards", "batch_size"), [(1, 12), (2, 6), (6, 2), (4, 3)])
def test_random_steps_are_the_same_when_the_number_of_shards_changes(shards: int, batch_size: int) -> None:
    straight = [ShardPlan(250, 3, seed=2).reader(shard, 4) for shard in range(3)]
    run = Run(ShardPlan(250, 3, seed=2), 4)
    run.go([7] * 3)
    for reader in straight:
        list(itertools.islice(reader, 7))
    run.resume(shards, batch_size)

    def step(readers: list[Reader]) -> list[int]:
        return sorted(i for reader in readers for i in next(reader).indices.tolist())

    for _ in range(250 // 12 - 7):
        assert step(run.readers) == step(straight)


def test_drop_leaves_out_no_more_than_it_says() -> None:
    run = Run(ShardPlan(103, 4, seed=2, tail="drop"), 5)
    run.go([3, 1, 2, 3])
    run.resume(3, 5)
    dropped = [int(i) for reader in run.readers for i in reader.dropped()]
    run.go([reader.steps() for reader in run.readers])
    assert sorted(run.read[0] + dropped) == list(range(103))
    assert add_sums(reader.certificate(0) for reader in run.readers) == run.plan.certificate()


def test_a_rank_may_be_epochs_ahead() -> None:
    run = Run(ShardPlan(60, 3, seed=2), 5)
    run.go([1, 4 * 3 + 2, 4])
    run.resume(2, 5)
    assert [each.epoch for each in run.plan.interrupted] == [0, 1, 2, 3]
    epochs = run.finish()
    assert all(sorted(run.read[epoch]) == list(range(60)) for epoch in range(epochs))


def test_keys_stay_where_they_are_after_a_resize_and_a_resume() -> None:
    keys = [f"key {i}" for i in range(200)]
    plan, _ = ShardPlan(200, 4, "hash", keys=keys).resize(5)
    run = Run(plan, 6, keys)
    run.go([3] * 5)
    run.resume(6, 6)
    grown, _ = plan.resize(6)
    assert np.array_equal(run.plan.owner(np.arange(200), epoch=1), grown.owner(np.arange(200)))
    still = run.plan.owner(np.arange(200), epoch=0)
    assert set(np.flatnonzero(still < 0)) == set(run.read[0])
    assert (still[still >= 0] == grown.owner(np.flatnonzero(still >= 0))).all()


def test_states_stay_small_however_often_a_run_is_stopped() -> None:
    run = Run(ShardPlan(10**9, 4, seed=2), 100)
    sizes = []
    for _ in range(6):
        run.go([5] * 4)
        run.resume(4, 100)
        sizes.append(len(json.dumps(run.readers[0].state_dict())))
    assert max(sizes) < 1000
    assert sizes[-1] - sizes[0] < 50


def test_weights_are_kept_or_changed() -> None:
    states = [ShardPlan(90, 2, weights=[1, 2]).reader(shard, 4).state_dict() for shard in range(2)]
    assert ShardPlan.resume(states) == ShardPlan(90, 2, weights=[1, 2])
    assert ShardPlan.resume(states, 3) == ShardPlan(90, 3)
    assert ShardPlan.resume(states, 2, weights=[2, 1]) == ShardPlan(90, 2, weights=[2, 1])


@pytest.mark.parametrize("count", [51, 10**30])
def test_a_leg_of_more_samples_than_there_were_is_refused(count: int) -> None:
    plan = ShardPlan(100, 2)
    readers = [plan.reader(shard, 4) for shard in range(2)]
    for reader in readers:
        next(reader)
    plan = ShardPlan.resume([reader.state_dict() for reader in readers], 3)
    states = json.loads(json.dumps([plan.reader(shard, 4).state_dict() for shard in range(3)]))
    for state in states:
        state["plan"]["interrupted"][0]["legs"][0]["delivered"] = [count, 4]
    with pytest.raises(StateError, match=f"shard 0 of an earlier run held 50, and the state says {count} were"):
        ShardPlan.resume(states, 3).indices(0)


def test_what_is_left_of_a_hash_plan_is_known_without_another_look_at_all_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three stops in the first 2,000 of 200,000 keys: each resume looks as far as reading had come, no further."""
    keys = np.arange(200_000)
    run = Run(ShardPlan(len(keys), 2, "hash", keys=keys, tail="pad"), 50)
    looked: list[int] = []
    units = HashedKeys.units
    for shards in (3, 2, 3):
        run.go([3] * run.plan.shards)
        states = [reader.state_dict() for reader in run.readers]
        run.plan = ShardPlan.resume(states, shards, keys=keys)
        with monkeypatch.context() as patched:
            patched.setattr(HashedKeys, "units", lambda *at: looked.append(at[2] - at[1]) or units(*at))
            sizes = run.plan.sizes(0)
        run._start(50)
        assert sizes.tolist() == [len(run.plan.indices(shard, 0)) for shard in range(shards)]
    assert sum(looked) <= (1 + 2 + 3) * 16384
