"""A server's promises in every order of its messages: the bound holds, nothing is lost, nobody waits for ever."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdscale.sync.requests import Answer, Ask, Message
from hvdscale.sync.shard import Shard
from hvdscale.update import DelayedNesterov, Nesterov

SIZE = 4  # values of each shard


@dataclass
class Worker:
    steps: int  # it makes in all
    made: int = 0
    waits_for: set[int] = field(default_factory=set)  # servers
    finished: bool = False  # everyone flushed
    flushing: bool = False
    dead: bool = False
    got: dict[int, Message] = field(default_factory=dict)


class World:
    """Workers, servers, and the messages between them; ``run`` lets one thing happen at a time, as chance has it."""

    def __init__(
        self, steps: list[int], servers: int, staleness: int | None, outer: DelayedNesterov, aside: int = 0
    ) -> None:
        ranks = len(steps) + aside
        self.staleness = staleness
        self.workers = [Worker(n) for n in steps] + [Worker(0) for _ in range(aside)]
        self.trains = range(len(steps))
        self.shards = [Shard(np.zeros(SIZE, np.float32), ranks, self.trains, staleness, outer) for _ in range(servers)]
        self.links: dict[tuple[str, int, int], deque[Any]] = {}
        self.longest_lead = 0
        self.together = False  # nobody flushes before all have made their steps

    def run(self, chance: Random, doomed: int | None = None) -> None:
        while True:
            events: list[tuple[Any, ...]] = [key for key, link in self.links.items() if link]
            events += [("work", w) for w, worker in enumerate(self.workers) if self.can_work(worker)]
            if doomed is not None and not self.workers[doomed].dead:
                events.append(("die", doomed))
            if not events:
                return
            self.happen(chance.choice(events))

    def can_work(self, worker: Worker) -> bool:
        if worker.waits_for or worker.finished or worker.dead:
            return False
        all_made = all(w.made == w.steps and (w.flushing or not w.waits_for) for w in self.workers)
        return worker.made < worker.steps or all_made or not self.together

    def happen(self, event: tuple[Any, ...]) -> None:
        kind, *where = event
        if kind == "work":
            self.work(*where)
        elif kind == "die":
            (rank,) = where
            self.workers[rank].dead = True
            for s in range(len(self.shards)):
                self.links.setdefault(("ask", rank, s), deque()).append(None)  # what was sent before still arrives
        elif kind == "ask":
            rank, s = where
            message = self.links["ask", rank, s].popleft()
            told = self.shards[s].lose(rank) if message is None else self.shards[s].handle(rank, message)
            for to, answer in told:
                self.links.setdefault(("answer", to, s), deque()).append(Message.decode(answer.encode()))
        else:
            rank, s = where
            answer = self.links["answer", rank, s].popleft()
            worker = self.workers[rank]
            assert answer.kind == Answer.WEIGHTS, answer
            worker.got[s] = answer
            worker.waits_for.discard(s)
            if not worker.waits_for and worker.flushing:
                worker.finished = True

    def work(self, rank: int) -> None:
        worker = self.workers[rank]
        others = [w.made for w in self.workers[: len(self.trains)] if not w.dead and not w.flushing]
        if worker.made < worker.steps:
            lead = worker.made - min(others)
            self.longest_lead = max(self.longest_lead, lead)
            assert self.staleness is None or lead <= self.staleness
            worker.made += 1
            kind, change, weight = Ask.PUSH, pushed(rank, worker.made), 1.0
        else:
            worker.flushing = True
            kind, change, weight = Ask.FLUSH, np.zeros(0, np.float32), 0.0
        worker.waits_for = set(range(len(self.shards)))
        for s in worker.waits_for:
            message = Message(kind, worker.made, weight, values=change.copy())
            self.links.setdefault(("ask", rank, s), deque()).append(message)


def pushed(rank: int, number: int) -> np.ndarray:
    """Whole numbers, each push another: sums of their halves and quarters are exact."""
    return np.full(SIZE, float(16 * number + rank), np.float32)


PLAIN = DelayedNesterov(1.0, 0.0)
worlds = {
    "steps": st.lists(st.integers(0, 6), min_size=1, max_size=4),
    "servers": st.integers(1, 3),
    "staleness": st.sampled_from([0, 1, 2, 5, None]),
    "chance": st.integers(0, 2**32).map(Random),
}


@settings(max_examples=150, deadline=None)
@given(**worlds, aside=st.integers(0, 2))
def test_in_every_order_the_bound_holds_and_everyone_finishes(
    steps: list[int], servers: int, staleness: int | None, chance: Random, aside: int
) -> None:
    world = World(steps, servers, staleness, PLAIN, aside)
    world.run(chance)
    assert all(worker.finished for worker in world.workers)
    for worker in world.workers:
        for s in range(servers):
            assert worker.got[s].ledger.tolist() == [*map(float, steps), *([0.0] * aside)]
            np.testing.assert_array_equal(worker.got[s].values, world.workers[0].got[s].values)


@settings(max_examples=100, deadline=None)
@given(
    ranks=st.sampled_from([1, 2, 4]), count=st.integers(1, 6), staleness=worlds["staleness"], chance=worlds["chance"]
)
def test_in_every_order_each_push_counts_once(ranks: int, count: int, staleness: int | None, chance: Random) -> None:
    world = World([count] * ranks, 2, staleness, PLAIN)
    world.together = True
    world.run(chance)
    everything = sum(pushed(r, k) for r in range(ranks) for k in range(1, count + 1))
    for shard in world.shards:
        np.testing.assert_array_equal(shard.values, -everything / ranks)


@settings(max_examples=100, deadline=None)
@given(steps=worlds["steps"], chance=worlds["chance"])
def test_with_staleness_0_every_order_gives_the_same_bits_as_steps_in_turn(steps: list[int], chance: Random) -> None:
    world = World(steps, 2, 0, DelayedNesterov(0.7, 0.9))
    world.run(chance)
    expected, slots = np.zeros(SIZE), {"momentum": np.zeros(SIZE)}
    for number in range(1, max(steps) + 1):
        pushes = [pushed(rank, number).astype(float) for rank, n in enumerate(steps) if n >= number]
        Nesterov(0.7, 0.9).step(expected, np.mean(pushes, axis=0), slots, 1.0)  # type: ignore[arg-type]
    for shard in world.shards:
        np.testing.assert_allclose(shard.values, expected, rtol=1e-5)
        np.testing.assert_array_equal(shard.values, world.shards[0].values)
    assert all(answer.stale == 0 for worker in world.workers for answer in worker.got.values())


@settings(max_examples=150, deadline=None)
@given(**worlds, doomed=st.integers(0, 3))
def test_a_worker_lost_at_any_moment_keeps_nobody_waiting(
    steps: list[int], servers: int, staleness: int | None, chance: Random, doomed: int
) -> None:
    world = World(steps, servers, staleness, PLAIN)
    doomed %= len(steps)
    world.run(chance, doomed)
    for rank, worker in enumerate(world.workers):
        if rank != doomed:
            assert worker.finished
            ledgers = [worker.got[s].ledger for s in range(servers)]
            assert all(ledger[rank] == steps[rank] for ledger in ledgers)


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_the_fastest_uses_all_the_room_it_has(staleness: int) -> None:
    """Worker 1 makes no step: worker 0 begins ``staleness`` + 1 of them, and then waits."""
    shard = Shard(np.zeros(SIZE, np.float32), 2, range(2), staleness, PLAIN)
    for number in range(1, staleness + 1):
        assert shard.handle(0, Message(Ask.PUSH, number, 1.0, values=pushed(0, number)))
    assert shard.handle(0, Message(Ask.PUSH, staleness + 1, 1.0, values=pushed(0, 1))) == []
    told = shard.handle(1, Message(Ask.PUSH, 1, 1.0, values=pushed(1, 1)))
    assert sorted(rank for rank, _ in told) == [0, 1]
    assert shard.handle(0, Message(Ask.READ))[0][1].kind == Answer.WEIGHTS


def test_what_a_push_met_since_the_pull_is_counted() -> None:
    shard = Shard(np.zeros(SIZE, np.float32), 2, range(2), None, PLAIN)
    for number in (1, 2, 3):
        ((_, mine),) = shard.handle(0, Message(Ask.PUSH, number, 1.0, values=pushed(0, number)))
        assert mine.stale == 0
    shard.handle(1, Message(Ask.READ))  # looks at the weights, and trains on from those it has
    ((_, other),) = shard.handle(1, Message(Ask.PUSH, 1, 1.0, values=pushed(1, 1)))
    assert other.stale == 3


def test_momentum_acts_once_for_all_workers() -> None:
    """Four pushes of four workers, one after the other, are one step of Nesterov's momentum on their mean."""
    outer = DelayedNesterov(0.7, 0.9)
    anchor, slots = np.zeros(SIZE, np.float32), {name: np.zeros(SIZE, np.float32) for name in outer.slots}
    expected, plain = np.zeros(SIZE, np.float32), {"momentum": np.zeros(SIZE, np.float32)}
    for number in (1, 2, 3):
        pushes = [pushed(rank, number) for rank in range(4)]
        for push in pushes:
            outer.step(anchor, push / np.float32(4), slots)
        outer.settle(anchor, slots)
        Nesterov(0.7, 0.9).step(expected, np.mean(pushes, axis=0), plain, 1.0)
    np.testing.assert_allclose(anchor, expected, rtol=1e-6)


@pytest.mark.parametrize("number", [1, 3])
def test_a_push_that_is_lost_or_comes_twice_is_refused(number: int) -> None:
    shard = Shard(np.zeros(SIZE, np.float32), 1, range(1), None, PLAIN)
    shard.handle(0, Message(Ask.PUSH, 1, 1.0, values=pushed(0, 1)))
    ((_, told),) = shard.handle(0, Message(Ask.PUSH, number, 1.0, values=pushed(0, number)))
    assert told.kind == Answer.MISCOUNT
    assert told.ledger.tolist() == [number, 2]
    np.testing.assert_array_equal(shard.values, -pushed(0, 1))


def test_ranks_that_wait_for_different_things_are_told_so() -> None:
    shard = Shard(np.zeros(SIZE, np.float32), 2, range(2), None, PLAIN)
    assert shard.handle(0, Message(Ask.SAVE, 0)) == []
    told = shard.handle(1, Message(Ask.FLUSH, 0))
    assert [(rank, answer.kind) for rank, answer in told] == [(0, Answer.APART), (1, Answer.APART)]


def test_a_worker_counted_out_is_told_so() -> None:
    shard = Shard(np.zeros(SIZE, np.float32), 2, range(2), 0, PLAIN)
    shard.handle(0, Message(Ask.PUSH, 1, 1.0, values=pushed(0, 1)))
    assert [rank for rank, _ in shard.lose(1)] == [0]
    ((_, told),) = shard.handle(1, Message(Ask.PUSH, 1, 1.0, values=pushed(1, 1)))
    assert told.kind == Answer.COUNTED_OUT
