"""Promises of the examples' command line: each plan can be asked for, and what a plan does not know is refused."""

import sys
from typing import Any

import pytest

from hvdscale.errors import PlanError
from hvdscale.sync import DiLoCo, EveryStep, Gossip, LocalSGD, ParameterServer, SlowMo, drift_target, post_local
from tests.core.test_text import EXAMPLES, flags

sys.path.insert(0, str(EXAMPLES))

from lm.plans import CHOICES, plan_of


@pytest.mark.parametrize(
    ("given", "plan"),
    [
        ("", EveryStep()),
        ("--sync every-step", EveryStep()),
        ("--update sharded", EveryStep("sharded")),
        ("--sync every-step --update central", EveryStep("central")),
        ("--sync local-sgd", LocalSGD(32)),
        ("--wire int4", EveryStep(wire="int4")),
        ("--sync local-sgd --every 8 --sync-warmup 5 --wire int8", LocalSGD(8, warmup=5, wire="int8")),
        ("--sync local-sgd --every post-local:100,16", LocalSGD(post_local(100, 16))),
        ("--sync local-sgd --every drift:0.02 --merge mix:0.3", LocalSGD(drift_target(0.02), merge="mix:0.3")),
        ("--sync local-sgd --state average --groups world", LocalSGD(32, state="average")),
        ("--sync diloco --fragments 4 --overlap 8", DiLoCo(32, fragments=4, overlap=8)),
        ("--sync diloco --outer-lr 1 --outer-momentum 0.5", DiLoCo(32, outer_lr=1.0, outer_momentum=0.5)),
        ("--sync local-sgd --groups node --across 4", LocalSGD(32, groups="node", across=4)),
        ("--sync gossip", Gossip()),
        ("--sync gossip --peers pairs --every 4", Gossip(4, peers="pairs")),
        ("--sync async", ParameterServer(None)),
        ("--sync async --staleness 3 --servers 1 --every 2", ParameterServer(3, servers=1, every=2)),
        ("--sync slowmo --every 4 --outer-lr 0.9 --outer-momentum 0.3", SlowMo(4, lr=0.9, momentum=0.3)),
    ],
)
def test_a_plan_by_its_flags(given: str, plan: Any) -> None:
    assert plan_of(flags(*given.split())) == plan


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ("--every 8", "--every goes with --sync .*local-sgd.*; --sync is every-step"),
        ("--update everywhere", 'takes "local", "central" or "sharded"'),
        ("--sync local-sgd --update sharded", "--update goes with --sync every-step; --sync is local-sgd"),
        ("--sync local-sgd --outer-lr 1", "--outer-lr goes with --sync diloco, slowmo, async"),
        ("--sync local-sgd --every 0", "every must be a whole number of steps from 1; it is 0"),
        ("--sync local-sgd --every 2.5", "it is '2.5'"),
        ("--sync local-sgd --every often", "it is 'often'"),
        ("--sync local-sgd --every post-local:5", "it is 'post-local:5'"),
        ("--sync local-sgd --every drift:-1", "target must be a number at least 0"),
        ("--sync local-sgd --wire int2", "wire is one of"),
        ("--sync local-sgd --groups rack", "groups"),
        ("--sync gossip --wire int8", "--wire goes with --sync every-step, local-sgd, diloco, slowmo"),
        ("--sync gossip --peers star", "peers is one of"),
        ("--sync async --staleness -1", "staleness"),
        ("--sync diloco --overlap 32", "overlap < every"),
        ("--sync diloco --outer-momentum 1.5", "momentum"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(given: str, rule: str) -> None:
    with pytest.raises(PlanError, match=rule):
        plan_of(flags(*given.split()))


def test_help_says_what_each_plan_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        flags("--help")
    shown = capsys.readouterr().out
    for name, choice in CHOICES.items():
        assert choice.help in shown
        assert all(f"--{flag.replace('_', '-')}" in shown for flag in choice.takes.values()), name
