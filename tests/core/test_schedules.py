"""Schedules: what they are known to take and hold, that they end, and that broken ones are told from good ones."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdscale.errors import PlanError
from hvdscale.model.actions import Action, Schedule
from hvdscale.model.passes import chain_links, with_messages, with_recompute, with_reductions
from hvdscale.model.schedules import SCHEDULES, make_schedule
from hvdscale.model.simulate import Costs, simulate

GOLDEN = {
    ("gpipe", 2, 3, 1): "F0 F1 F2 B0 B1 B2\nF0 F1 F2 B0 B1 B2",
    ("1f1b", 2, 3, 1): "F0 F1 B0 F2 B1 B2\nF0 B0 F1 B1 F2 B2",
    ("1f1b", 3, 2, 1): "F0 F1 B0 B1\nF0 F1 B0 B1\nF0 B0 F1 B1",
    ("zb", 2, 3, 1): "F0 F1 I0 W0 F2 I1 W1 I2 W2\nF0 I0 F1 I1 W0 F2 I2 W1 W2",
    ("interleaved", 2, 2, 2): ("F0@0 F1@0 F0@2 F1@2 B0@2 B1@2 B0@0 B1@0\nF0@1 F1@1 F0@3 B0@3 F1@3 B1@3 B0@1 B1@1"),
}


@pytest.mark.parametrize("which", GOLDEN, ids=str)
def test_a_schedule_reads_as_in_the_paper_and_back(which: tuple[str, int, int, int]) -> None:
    schedule = make_schedule(*which)
    assert schedule.text() == GOLDEN[which]
    full = with_reductions(with_messages(with_recompute(schedule), chain_links(schedule.stages)), [{0, 1}])
    for one in (schedule, full):
        assert Schedule.parse(one.text(), schedule.microbatches, schedule.stages).actions == one.actions


P_M = [(p, m) for p in (2, 3, 4, 8) for m in (1, 2, 4, 7, 16)]


@pytest.mark.parametrize(("p", "m"), P_M)
def test_time_and_memory_are_those_of_the_papers(p: int, m: int) -> None:
    """Forward 1, backward 2 (1.5 for inputs, 0.5 for weights where it is divided)."""
    for name in ("gpipe", "1f1b"):
        played = simulate(make_schedule(name, p, m))
        assert played.makespan == 3 * (m + p - 1)
        assert played.bubble == pytest.approx((p - 1) / (m + p - 1))
        assert played.speedup == pytest.approx(p * m / (m + p - 1))
    assert simulate(make_schedule("gpipe", p, m)).peak_activations == (m,) * p
    assert simulate(make_schedule("1f1b", p, m)).peak_activations == tuple(min(m, p - rank) for rank in range(p))
    zero = simulate(make_schedule("zb", p, m), Costs.even(p, 1.0, 2.0, weight_share=0.5))
    assert max(zero.peak_activations) <= min(m, p), "zero bubble holds no more than 1F1B's first rank"
    assert zero.makespan <= 3 * (m + p - 1)
    if m >= 2 * p - 1:
        assert zero.makespan == 3 * m + (p - 1) * (1 + 1 - 1), "(p - 1)(F + I - W), as in the paper"
    for v in (2, 3):
        if m % p == 0:
            played = simulate(make_schedule("interleaved", p, m, v))
            assert played.makespan == 3 * m * v + 3 * (p - 1), "a bubble v times smaller, of a work v times larger"


costs = st.floats(0.1, 10)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_generated_schedule_deadlocks(data: st.DataObject) -> None:
    """Whatever the method, the sizes, the costs and the passes: it ends, and takes no less than its busiest rank."""
    name = data.draw(st.sampled_from(SCHEDULES))
    p, m = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 20))
    v = data.draw(st.integers(1, 4)) if name in ("gpipe", "interleaved") else 1
    stages = p * v
    pairs = st.tuples(st.integers(0, stages - 1), st.integers(0, stages - 1)).filter(lambda ab: ab[0] + 1 < ab[1])
    skips = data.draw(st.lists(pairs, max_size=4, unique=True)) if stages > 2 else []
    ties = data.draw(st.lists(st.sets(st.integers(0, stages - 1), min_size=1), max_size=3))
    schedule = make_schedule(name, p, m, v)
    if data.draw(st.booleans()):
        schedule = with_recompute(schedule, data.draw(st.sets(st.integers(0, stages - 1))))
    links = (*chain_links(stages), *skips)
    full = with_reductions(with_messages(schedule, links), ties)
    forward = data.draw(st.lists(costs, min_size=stages, max_size=stages))
    backward = data.draw(st.lists(costs, min_size=stages, max_size=stages))
    prices = Costs(tuple(forward), tuple(backward), transfer=data.draw(st.floats(0, 3)), reduction=0.5)
    for one in (schedule, full):
        played = simulate(one, prices, links)
        assert played.makespan >= max(played.busy) - 1e-9
        assert 0 <= played.bubble < 1
        for row in played.events:
            assert all(a.end <= b.start + 1e-9 for a, b in itertools.pairwise(row)), "a rank does one thing at a time"


BROKEN = {
    "ranks wait for each other": ("F0 B0 F1 B1\nF0 F1 B0 B1", "rank 0 at B0@0; rank 1 at F1@1"),
    "a pass is missing": ("F0 B0\nF0", "B0@1 is missing"),
    "a pass is there twice": ("F0 F0 B0\nF0 B0", "rank 0 has F0@0 twice"),
    "backward comes first": ("B0 F0\nF0 B0", "F0@0 comes before B0@0"),
    "a stage is elsewhere": ("F0@1 B0@1\nF0@0 B0@0", "rank 0 has F0@1"),
    "half a backward pass": ("F0 I0\nF0 I0 W0", "W0@0 is missing"),
    "whole and halves": ("F0 B0 I0 W0\nF0 I0 W0", "whole (B) everywhere"),
    "a send without a receive": ("F0 SF0>1 B0\nF0 B0", "RF0<0@1 is missing"),
    "a receive too late": ("F0 SF0>1 RB0<1 B0\nF0 RF0<0 B0 SB0>0", "RF0<0@1 comes before F0@1"),
    "a message nobody needs": ("F0 SF0>1 RB0<1 B0 SF0>0\nRF0<0 F0 B0 SB0>0", "SF0>0@0 does not"),
    "receives cross": (
        "RB0<1 F0 SF0>1 B0\nRF0<0 F0 B0 SB0>0",
        "rank 0 at RB0<1@0; rank 1 at RF0<0@1",
    ),
    "sums in another order": ("F0 B0 T0 T1\nF0 B0 T1 T0", "rank 0 at T0@0; rank 1 at T1@1"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_schedule_is_told(what: str) -> None:
    text, rule = BROKEN[what]
    with pytest.raises(PlanError) as caught:
        simulate(Schedule.parse(text, 2 if "F1" in text else 1, 2))
    assert rule in str(caught.value)


def test_recomputation_trades_time_for_memory() -> None:
    prices = Costs.even(4, activation_bytes=(100,) * 4, input_bytes=(10,) * 4)
    plain = simulate(make_schedule("1f1b", 4, 8), prices)
    again = simulate(with_recompute(make_schedule("1f1b", 4, 8)), prices)
    assert plain.peak_bytes == (400, 300, 200, 100)
    assert again.peak_bytes == (140, 130, 120, 100), "inputs of those on their way, all of one"
    assert again.makespan > plain.makespan
    assert simulate(with_recompute(make_schedule("1f1b", 4, 8)), prices).schedule.text().startswith("F0 F1 F2 F3 C0 B0")


def test_messages_take_the_time_of_their_link() -> None:
    schedule = with_messages(make_schedule("gpipe", 2, 1), ((0, 1),))
    assert simulate(schedule, Costs.even(2, transfer=0.5)).makespan == 1 + 0.5 + 1 + 2 + 0.5 + 2
    assert simulate(schedule, Costs.even(2, transfer={(0, 1): 0.25, (1, 0): 1.0})).makespan == 7.25


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (("2f2b", 2, 2), "one of gpipe, 1f1b, interleaved, zb"),
        (("1f1b", 0, 2), "number of ranks"),
        (("1f1b", 2, 0), "number of micro-batches"),
        (("gpipe", 2, True), "number of micro-batches"),
        (("zb", 2, 2, 2), '"zb" takes one'),
    ],
)
def test_what_cannot_be_is_refused(arguments: tuple[str, int, int], rule: str) -> None:
    with pytest.raises(PlanError, match=rule):
        make_schedule(*arguments)


@pytest.mark.parametrize("text", ["F", "X0", "SF0", "F0>1", "B0@"])
def test_a_word_that_is_no_action_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="none"):
        Action.parse(text)
