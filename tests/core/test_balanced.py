"""BalancedPlan: the plan's samples, each once, with ranks that finish each step together."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdscale.data import BalancedPlan, Feed, Passes, ShardPlan, rank_costs
from hvdscale.data.batch import Batch
from hvdscale.errors import PlanError, StateError
from tests.core.real_text import document_lengths

POLICIES = ("ordered", "random", "hash")
ATTENTION = 1 / (6 * 768)


def balanced(n: int, shards: int, policy: str = "random", tail: str = "exact", **more: Any) -> BalancedPlan:
    lengths = np.arange(n) * 7919 % 997 + 1
    return BalancedPlan(ShardPlan(n, shards, policy, seed=5, tail=tail), lengths, **more)


def epoch_of(plan: BalancedPlan, batch_size: int, epoch: int = 0) -> list[list[Batch]]:
    """For each rank its batches of one epoch."""
    return [list(Feed(plan, shard, batch_size, epoch).batches()) for shard in range(plan.shards)]


def samples(batches: list[Batch]) -> list[int]:
    return [int(i) for batch in batches for i in batch.indices[: batch.count]]


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 300),
    shards=st.integers(1, 7),
    batch_size=st.integers(1, 20),
    policy=st.sampled_from(POLICIES),
    tail=st.sampled_from(["exact", "pad"]),
    equal_counts=st.booleans(),
)
def test_every_sample_once_in_every_epoch(
    n: int, shards: int, batch_size: int, policy: str, tail: str, equal_counts: bool
) -> None:
    plan = balanced(n, shards, policy, tail, equal_counts=equal_counts)
    for epoch in range(2):
        ranks = epoch_of(plan, batch_size, epoch)
        assert sorted(itertools.chain(*map(samples, ranks))) == list(range(n))
        assert len({len(batches) for batches in ranks}) == 1, "all ranks take as many steps"
        assert len(ranks[0]) == plan.reader(0, batch_size).steps(epoch)
        for shard, batches in enumerate(ranks):
            filled = [batch.step for batch in batches if len(batch)]
            assert filled == list(range(plan.reader(shard, batch_size).filled_steps(epoch))), "the first ones"
            assert tail == "exact" or len(filled) == len(batches), "a loader gives all ranks as many"
            assert [batch.step for batch in batches] == list(range(len(batches)))
            assert [batch.last for batch in batches] == [False] * (len(batches) - 1) + [True] * bool(batches)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_holds_the_samples_of_the_plans_step(policy: str) -> None:
    plan = balanced(400, 4, policy)
    plain = [list(plan.plan.reader(shard, 8).ahead(1)) for shard in range(4)]
    for step, parts in enumerate(zip(*epoch_of(plan, 8), strict=True)):
        expected = samples([batches[step] for batches in plain if step < len(batches)])
        assert sorted(samples(list(parts))) == sorted(expected)


@pytest.mark.parametrize(("ranks", "batch_size"), [(2, 16), (4, 16), (8, 16), (16, 16)])
def test_ranks_finish_together_on_real_documents(ranks: int, batch_size: int) -> None:
    lengths = np.minimum(document_lengths(), 16384)
    plan = BalancedPlan(ShardPlan(len(lengths), ranks), lengths, quadratic=ATTENTION)
    plain = [list(plan.plan.reader(shard, batch_size).ahead(1)) for shard in range(ranks)]
    full = len(lengths) // (ranks * batch_size)

    def worst(by_rank: list[list[Batch]]) -> float:
        steps = [[samples([batches[step]]) for batches in by_rank] for step in range(full)]
        costs = [
            np.concatenate([rank_costs(lengths[s], np.zeros(len(s), int), 1, 1.0, ATTENTION) for s in step])
            for step in steps
        ]
        return max(float(cost.max() / cost.mean()) for cost in costs)

    assert worst(epoch_of(plan, batch_size)) <= 1.05
    assert worst(plain) > 1.3


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 300),
    policy=st.sampled_from(POLICIES),
    runs=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 12), st.integers(0, 30)), min_size=1, max_size=4),
)
def test_exactly_once_over_stops_with_any_number_of_ranks(
    n: int, policy: str, runs: list[tuple[int, int, int]]
) -> None:
    """Each run: so many ranks, so large batches, so many steps before the stop."""
    plan, read = balanced(n, runs[0][0], policy), []
    for i, (shards, batch_size, steps) in enumerate(runs):
        feeds = [Feed(plan, shard, batch_size) for shard in range(shards)]
        for feed in feeds:
            for batch in itertools.islice(feed.batches(), steps):
                feed.deliver()
                read += batch.indices.tolist()
        states = json.loads(json.dumps([feed.state_dict() for feed in feeds]))
        plan = plan.resume(states, runs[i + 1][0] if i + 1 < len(runs) else 2)
        if plan.plan.first_epoch > 0:
            assert sorted(read) == list(range(n))
            return
    read += itertools.chain(*map(samples, epoch_of(plan, 5)))
    assert sorted(read) == list(range(n))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 60),
    policy=st.sampled_from(POLICIES),
    ranks=st.integers(1, 6),
    batch_size=st.integers(1, 4),
    stop=st.integers(0, 40),
    shards=st.integers(1, 5),
)
def test_ranks_in_step_may_stop_anywhere(
    n: int, policy: str, ranks: int, batch_size: int, stop: int, shards: int
) -> None:
    """As loaders hand out: a pass is over with its last sample, though the others' next step brings nothing here."""
    plan, read = balanced(n, ranks, policy), []
    loaders = [(feed, Passes(feed)) for feed in (Feed(plan, rank, batch_size) for rank in range(ranks))]
    for _, passes in loaders:
        for turn, batch in passes.draw():
            if batch.step >= stop:
                break
            assert passes.deliver(turn) is batch
            read += batch.indices.tolist()
    plan = plan.resume([feed.state_dict() for feed, _ in loaders], shards)
    if plan.first_epoch == 0:
        rest = [Feed(plan, shard, 3) for shard in range(shards)]
        for feed in rest:
            for batch in feed.batches():
                feed.deliver()
                read += batch.indices.tolist()
        assert sum(feed.reader.certificate(0) for feed in rest) % 2**64 == plan.certificate()
    assert sorted(read) == list(range(n))


def test_a_loader_has_the_batch_it_handed_out() -> None:
    feed = Feed(balanced(9, 2), 1, 2)
    passes = Passes(feed)
    for turn, drawn in passes.draw():
        assert passes.deliver(turn) is drawn is feed.batch
    assert feed.reader.epoch == 1, "a last step without a sample is over"


def test_a_reader_goes_on_into_the_next_epoch() -> None:
    plan = balanced(50, 3)
    readers = [plan.reader(shard, 4) for shard in range(3)]
    steps = readers[0].steps() + readers[0].steps(1)
    got = [list(itertools.islice(reader, steps)) for reader in readers]
    for epoch in range(2):
        of_epoch = [batch for batches in got for batch in batches if batch.epoch == epoch]
        assert sorted(samples(of_epoch)) == list(range(50))
    assert [(reader.epoch, reader.step) for reader in readers] == [(2, 0)] * 3


def test_ranks_of_a_tiny_last_step_get_empty_batches() -> None:
    ranks = epoch_of(balanced(4 * 3 * 2 + 1, 4), 3)
    assert sorted(len(batches[-1]) for batches in ranks) == [0, 0, 0, 1]
    ranks = epoch_of(balanced(4 * 3 * 2 + 1, 4, tail="pad"), 3)
    assert sorted(batches[-1].count for batches in ranks) == [0, 0, 0, 1]
    assert {len(batches[-1]) for batches in ranks} == {1}, "one that is not valid fills"


@pytest.mark.parametrize(("tail", "passes"), [("exact", [3, 2, 2, 2]), ("pad", [3, 3, 3, 3])])
def test_a_pass_is_as_long_as_it_says(tail: str, passes: list[int]) -> None:
    feeds = [Feed(balanced(4 * 3 * 2 + 1, 4, tail=tail), shard, 3) for shard in range(4)]
    assert [len(feed) for feed in feeds] == passes
    for feed, count in zip(feeds, passes, strict=True):
        for left, batch in zip(range(count, 0, -1), filter(len, feed.batches()), strict=True):
            assert len(feed) == left
            assert feed.deliver() is batch
        feed.finish()
        assert (feed.epoch, len(feed)) == (1, count)


def two_states() -> list[dict[str, Any]]:
    readers = [balanced(50, 2).reader(shard, 4) for shard in range(2)]
    for reader in readers:
        next(reader)
    return [reader.state_dict() for reader in readers]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: [s[0], {**s[1], "step": 2}], "rank 1 is before step 2 of epoch 0, another before step 1"),
        (
            lambda s: [s[0], {**s[1], "epoch": 1, "step": 0}],
            "rank 1 is before step 0 of epoch 1",
        ),
        (lambda s: [s[0], {**s[1], "step": [1]}], r"step must be an integer from 0; it is \[1\]"),
        (lambda s: [s[0], {**s[1], "epoch": 1, "step": 0, "own": {}}], "damaged .'shard'."),
        (lambda s: [s[0], s[1]["own"]], "State 1 is not that of a balanced reader"),
        (lambda s: [s[0], 3], "State 1 is not that of a balanced reader .*: 3"),
        (lambda s: [s[0], {"format": "balanced-v1", "epoch": 0, "step": 1}], "this one is damaged .'own'."),
        (
            lambda s: [s[0], {**s[1], "own": {**s[1]["own"], "step": 2, "delivered": 8}}],
            r"at .* \[\(0, 1\), \(0, 2\)\]",
        ),
        (lambda s: [{k: v for k, v in x.items() if k != "step"} for x in s], "counts its steps; this one is damaged"),
        (lambda s: s[:1], "shard"),
        (lambda s: [], "states of all shards, as a list; there are none"),
    ],
)
def test_states_that_do_not_fit(change: Any, message: str) -> None:
    with pytest.raises(StateError, match=message):
        balanced(50, 2).resume(change(two_states()), 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BalancedPlan(ShardPlan(3, 2), [1, 2]), "there are 3 samples and 2 lengths"),
        (lambda: BalancedPlan(ShardPlan(1, 2), [-1]), "sample 0 has -1"),
        (lambda: BalancedPlan(ShardPlan(1, 2), [1.0]), "Lengths are integers"),
        (lambda: BalancedPlan(ShardPlan(1, 2), [1], linear=0.0), "both factors are 0"),
        (lambda: BalancedPlan(ShardPlan(1, 2), [1], quadratic=-1.0), "quadratic must be a finite number from 0"),
        (lambda: BalancedPlan(ShardPlan(1, 2, weights=[1, 2]), [1]), "gives every rank equal work; the weights"),
        (lambda: BalancedPlan(7, [1]), "plan is a ShardPlan; it is 7"),  # type: ignore[arg-type]
        (lambda: balanced(9, 2, equal_counts="yes"), "equal_counts is True or False; it is 'yes'"),
        (lambda: balanced(9, 2).reader(0, 2).deliver(None), "batch is a Batch; it is None"),
        (lambda: balanced(9, 2).reader(2, 1), r"shard must be an integer in 0\.\.1; it is 2"),
        (lambda: balanced(9, 2).reader(0, 0), r"batch_size must be an integer in 1\.\..*; it is 0"),
    ],
)
def test_bad_arguments(call: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        call()


class TestFeed:
    """What a loader that fetches ahead is fed with."""

    @pytest.mark.parametrize("kind", ["plan", "balanced"])
    def test_only_what_is_delivered_counts(self, kind: str) -> None:
        plan = balanced(60, 2)
        feed = Feed(plan if kind == "balanced" else plan.plan, 0, 4)
        drawn = list(itertools.islice(feed.batches(), 5))
        before = feed.state_dict()
        assert [feed.deliver() is batch for batch in drawn[:2]] == [True, True]
        assert before != feed.state_dict()
        assert len(feed) == feed.reader.steps() - 2
        again = next(feed.batches())
        assert (again.step, again.indices.tolist()) == (2, drawn[2].indices.tolist())
        assert feed.deliver() is again

    def test_a_pass_is_an_epoch(self) -> None:
        feed = Feed(ShardPlan(20, 2, seed=1), 1, 4)
        for epoch in range(3):
            assert (feed.epoch, len(feed)) == (epoch, 3)
            for batch in feed.batches():
                assert batch.epoch == epoch
                assert feed.deliver() is feed.batch is batch
            assert len(feed) == 0
            feed.finish()

    def test_passes_go_on_where_a_shard_has_nothing(self) -> None:
        feed = Feed(ShardPlan(1, 2, "ordered"), 1, 4)
        for epoch in range(3):
            assert (feed.epoch, list(feed.batches()), len(feed)) == (epoch, [], 0)
            feed.finish()

    @pytest.mark.parametrize("kind", ["plan", "balanced"])
    def test_passes_of_all_shards_stay_over_the_same_epochs(self, kind: str) -> None:
        """Also after a stop that left one shard nothing of the epoch."""
        plan = balanced(40, 2)
        readers = [plan.plan.reader(shard, 4) for shard in range(2)]
        for _ in range(5):
            next(readers[1])
        rest = ShardPlan.resume([reader.state_dict() for reader in readers])
        whole = BalancedPlan(rest, plan.lengths) if kind == "balanced" else rest
        feeds = [Feed(whole, shard, 4) for shard in range(2)]
        for epoch, count in enumerate((20, 40)):
            got = []
            for feed in feeds:
                assert feed.epoch == epoch
                batches = len(feed)
                for batch in feed.batches():
                    feed.deliver()
                    got += batch.indices.tolist()
                    batches -= 1
                assert batches == 0
                feed.finish()
            assert len(set(got)) == len(got) == count

    def test_an_order_that_cannot_be(self) -> None:
        feed = Feed(ShardPlan(20, 2), 1, 4)
        with pytest.raises(PlanError, match="delivered after it is drawn; none is waiting in epoch 0"):
            feed.deliver()
        next(feed.batches())
        with pytest.raises(PlanError, match="Step 0 of epoch 0 is not delivered yet"):
            feed.finish()
