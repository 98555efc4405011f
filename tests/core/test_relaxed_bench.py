"""The benches of relaxed synchronisation: what is read off a curve, and what the formula says that travels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ci.bench import relaxed_curves
from ci.bench.relaxed_curves import Curve, read_curves
from ci.bench.relaxed_links import Measured, judged, read_record, sooner, steps_of, write_record
from ci.bench.relaxed_plans import BEST, DDP, FULL_WIRE, INDEPENDENT, PLANS, POST_LOCAL, WIRES, rounds_in, sent_bytes
from hvdscale.runtime.channel import TransportChannel
from hvdscale.runtime.transport import Transport, run_loopback
from hvdscale.sync import LocalSGD, Rounds
from tests.core.numpy_store import NumPyStore, NumPyTensors

CURVE = Curve((100, 200, 300), (3.0, 2.5, 2.4))


@pytest.mark.parametrize(("step", "loss"), [(100, 3.0), (150, 2.75), (300, 2.4), (999, 2.4)])
def test_a_curve_between_its_points(step: int, loss: float) -> None:
    assert CURVE.at(step) == pytest.approx(loss)


@pytest.mark.parametrize(("loss", "step"), [(3.5, 100), (2.75, 150), (2.5, 200), (2.45, 250), (2.39, None)])
def test_when_a_curve_reaches_a_loss(loss: float, step: float | None) -> None:
    assert CURVE.reaches(loss) == (None if step is None else pytest.approx(step))


def test_recorded_curves_are_read_in_the_order_of_steps(tmp_path: Path) -> None:
    (tmp_path / "curves.json").write_text(json.dumps({"every step": {"64": 3.0, "300": 2.0}}))
    assert read_curves(tmp_path / "curves.json") == {"every step": Curve((64, 300), (3.0, 2.0))}


@pytest.mark.parametrize("wire", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("fragments", [1, 2])
def test_the_formula_is_what_rounds_count(wire: str, fragments: int) -> None:
    shapes = {"a": (256, 512), "b": (64,), "c": (512, 256)}
    plan = LocalSGD(4, wire=wire, fragments=fragments)

    def body(transport: Transport) -> int:
        store = NumPyStore(NumPyTensors({n: np.zeros(s, np.float32) for n, s in shapes.items()}))
        rounds = Rounds(plan, store, TransportChannel(transport))
        for _ in range(8):
            rounds.before_step()
            rounds.after_step()
        return rounds.bytes_sent

    counted = run_loopback(4, body)
    told = sent_bytes(plan, 4, steps=8, matrix_values=2 * 256 * 512, other_values=64)
    assert counted == [pytest.approx(told, rel=0.01)] * 4  # headers are less than that


def test_periods_that_grow_are_counted() -> None:
    assert rounds_in(LocalSGD(4), 30) == 7.5
    assert rounds_in(LocalSGD(lambda step: 2 if step < 6 else 4), 18) == 6  # after 2, 4, 6, 10, 14, 18


def test_what_was_measured_can_be_gone_on_with(tmp_path: Path) -> None:
    measured = {100.0: {DDP: Measured([2.0, 3.0], 1e6, 9.3e5, 9e5)}, None: {BEST: Measured([0.5])}}
    assert read_record(tmp_path / "links.json") == {}
    write_record(tmp_path / "links.json", measured)
    assert read_record(tmp_path / "links.json") == measured


def test_time_to_a_loss_is_steps_needed_times_seconds_of_a_step() -> None:
    measured = {DDP: Measured([2.0, 9.0, 2.0]), BEST: Measured([0.5])}
    curves = {"every step": Curve((300,), (2.45,)), BEST: CURVE, "not measured": CURVE}
    found = sooner(curves, measured)
    assert found == {DDP: (600.0, 1.0), BEST: (pytest.approx(125), pytest.approx(4.8))}


def test_targets_are_judged_at_their_rates() -> None:
    sent = sent_bytes(PLANS["DiLoCo, 32"], 4, 32)
    by_way = {
        INDEPENDENT: Measured([0.9]),
        "DiLoCo, 32": Measured([1.0], wire_bytes=1.06 * sent, data_bytes=1.01 * sent),
        "every step": Measured([2.0]),
        "local SGD, 1": Measured([2.08]),
    }
    rows = {what: met for what, _, _, met in judged({100: by_way}, {}, 32)}
    assert rows == {
        "100 Mbit/s: DiLoCo, 32, of the step without communication": True,
        "100 Mbit/s: every=1 over every step": True,
        "100 Mbit/s: DiLoCo, 32, bytes on the wire over the formula": False,
        "100 Mbit/s: DiLoCo, 32, without headers over the formula": True,
    }


def test_curves_are_judged_against_synchronous_training_and_the_full_wire() -> None:
    curves = {
        FULL_WIRE: Curve((300,), (2.0,)),  # every step
        BEST: Curve((300, 360), (2.01, 1.99)),  # over int4, too
        WIRES["int8"][0]: Curve((300,), (2.02,)),
    }
    rows = relaxed_curves.judged(curves)
    assert [met for *_, met in rows] == [True, True, False, True]
    assert [reached for _, reached, _, _ in rows] == pytest.approx([0.1, 0.005, 0.01, 0.005])


@pytest.mark.parametrize(
    ("way", "steps"),
    [(DDP, 2), ("every step", 2), ("every step, int4", 8), ("local SGD, 1", 2), (POST_LOCAL, 16), ("DiLoCo, 32", 32)],
)
def test_ways_that_meet_often_take_fewer_steps(way: str, steps: int) -> None:
    assert steps_of(way, 32) == steps
