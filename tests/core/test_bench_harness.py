"""The bench harness: interleaving, medians, ratios, targets, JSON."""

from __future__ import annotations

import json
import time
from argparse import ArgumentTypeError, Namespace
from pathlib import Path

import pytest

from ci.bench.allreduce_links import limit_seconds
from ci.bench.harness import (
    Process,
    Results,
    Target,
    Variant,
    arguments,
    as_json,
    finish,
    interleave,
)
from ci.bench.local import local_variants, settings_to_try
from ci.bench.workers.ranks import digest, median_seconds

LIMIT = Variant("limit", "limit", fixed={"step": 1.0})
PEER = Variant("peer", "peer", fixed={"step": 3.0})
OURS = Variant("ours", "ours", fixed={"step": 1.25})


def test_launches_alternate_and_medians_are_over_rounds() -> None:
    order: list[str] = []
    times = {"limit": iter([1.0, 9.0, 2.0]), "ours": iter([4.0, 3.0, 8.0])}

    def run(variant: Variant, deadline_seconds: float) -> dict[str, float]:
        assert deadline_seconds == 7
        order.append(variant.name)
        return {"step": next(times[variant.name])}

    results = interleave([LIMIT, OURS], rounds=3, deadline_seconds=7, run=run)
    assert order == ["limit", "ours"] * 3
    assert results.samples["ours"] == {"step": [4.0, 3.0, 8.0]}
    assert (results.median("limit", "step"), results.median("ours", "step")) == (2.0, 4.0)
    assert results.ratio("step", of="ours", to="limit") == 4.0  # of 4, 1/3 and 4: round by round
    assert results.ratio_to("limit", "step", "ours") == 4.0
    assert results.ratio_to("peer", "step", "ours") is None


def test_what_was_not_measured_once_a_round_is_compared_by_medians() -> None:
    samples = {"limit": {"step": [4.0]}, "ours": {"step": [1.0, 2.0, 9.0]}}
    assert Results((LIMIT, OURS), samples).ratio("step", of="limit", to="ours") == 2.0


def test_a_metric_without_a_limit_has_no_ratio_to_it() -> None:
    ours = Variant("ours", "ours", fixed={"step": 2.0, "small": 0.1})
    results = interleave([LIMIT, ours], 1, 1)
    assert results.metrics == ("step", "small")
    assert results.ratio_to("limit", "small", "ours") is None


@pytest.mark.parametrize(
    ("target", "reached", "met"),
    [
        (Target("limit", 0.8), 0.8, True),
        (Target("limit", 0.81), 0.8, False),
        (Target("peer", 2.4), 2.4, True),
        (Target("peer", 2.41, ("step",)), 2.4, False),
    ],
)
@pytest.mark.parametrize("strict", [False, True])
def test_targets_are_times_of_the_other_over_ours(
    target: Target, reached: float, met: bool, strict: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    results = interleave([LIMIT, PEER, OURS], 1, 1)
    (row,) = results.judged([target])
    assert (row["reached"], row["met"]) == (pytest.approx(reached), met)
    code = finish("a title", results, [target], Namespace(json=None, strict=strict))
    assert code == int(strict and not met)
    assert ("missed" in capsys.readouterr().out) != met


def test_the_table_and_the_json_hold_medians_and_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = Results(
        (LIMIT, PEER, OURS),
        {"limit": {"step": [1.0] * 3}, "peer": {"step": [3.0] * 3}, "ours": {"step": [0.5, 2.0, 1.25]}},
    )
    file = tmp_path / "out.json"
    finish("a title", results, [Target("peer", 2.0)], Namespace(json=file, strict=False), ["one thread"])
    shown = capsys.readouterr().out
    assert all(part in shown for part in ("a title", "1.25 s", "500.0 ms .. 2.00 s", "2.40", "0.80", "one thread"))
    written = json.loads(file.read_text())
    assert written == json.loads(
        json.dumps(as_json("a title", results, results.judged([Target("peer", 2.0)]), ["one thread"]))
    )
    (ours,) = (row for row in written["results"] if row["role"] == "ours")
    assert ours["samples_seconds"] == [0.5, 2.0, 1.25]
    assert (ours["median_seconds"], ours["over_limit"], ours["over_ours"]) == (1.25, 1.25, 1.0)
    assert written["targets"] == [{"metric": "step", "against": "peer", "reached": 2.4, "at_least": 2.0, "met": True}]


@pytest.mark.parametrize("processes", [(), (Process(("true",)),)])
def test_a_variant_is_run_or_known_not_both(processes: tuple[Process, ...]) -> None:
    with pytest.raises(ValueError, match="both or neither"):
        Variant("odd", "peer", processes=processes, fixed={"step": 1.0} if processes else None)


def test_options() -> None:
    parser = arguments("about", rounds=5, steps=20, quick=(1, 12))
    assert (parser.parse_args([]).rounds, parser.parse_args([]).steps, parser.parse_args([]).quick) == (5, 20, False)
    quick = parser.parse_args(["--quick"])
    assert (quick.rounds, quick.steps, quick.quick) == (1, 12, True)
    with pytest.raises(SystemExit):
        parser.parse_args(["--rounds", "0"])


def test_a_local_bench_gives_all_ranks_the_same_threads_and_tries_settings() -> None:
    roles, names = {"independent": "limit", "hvdscale": "ours"}, {"independent": "alone", "hvdscale": "hvdscale"}
    variants, note = local_variants("some.worker", 2, roles, names, 7, [settings_to_try("A=1,B=2")])
    assert [(v.name, v.role, v.ranks) for v in variants] == [
        ("alone", "limit", 2),
        ("hvdscale", "ours", 2),
        ("A=1 B=2", "peer", 2),
    ]
    processes = [p for v in variants for p in v.processes]
    assert [p.env.get("BENCH_RANK") for p in processes] == ["0", "1", None, None]
    assert {p.env["OMP_NUM_THREADS"] for p in processes} == {note.split()[-2]}
    assert (processes[-1].env["A"], processes[-1].env["B"]) == ("1", "2")
    assert all(p.command[-4:] == ("--way", way, "--steps", "7") for p, way in zip(processes, WAYS, strict=True))


WAYS = ("independent", "independent", "hvdscale", "hvdscale")


@pytest.mark.parametrize("text", ["", "A", "=1", "A=1,"])
def test_settings_to_try_are_names_and_values(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="NAME=VALUE"):
        settings_to_try(text)


def test_the_median_leaves_the_warm_up_out() -> None:
    pauses = iter([0.2, 0.0, 0.02, 0.0])
    assert median_seconds(lambda: time.sleep(next(pauses)), steps=3, warmup=1) < 0.02


def test_the_limit_of_a_link() -> None:
    assert limit_seconds(10**7, hosts=4, rate_mbit=200) == pytest.approx(0.6)
    assert limit_seconds(10**6, hosts=2, rate_mbit=8) == pytest.approx(1.0)


def test_digests_tell_weights_apart() -> None:
    import numpy as np

    a, b = np.zeros(3, np.float32), np.array([0, 0, 1e-9], np.float32)
    assert digest([a, a]) == digest([a.copy(), a]) != digest([a, b])
