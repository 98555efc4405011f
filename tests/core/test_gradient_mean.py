"""Promises of gradients averaged in a narrow wire format: the mean of all, late by a step, on the same bits."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from hvdscale.errors import DesyncError, PlanError, StateError
from hvdscale.runtime.channel import TransportChannel
from hvdscale.runtime.transport import Transport
from hvdscale.sync import EveryStep, Reduction
from hvdscale.sync.gradient_mean import GradientMean
from hvdscale.sync.tensors import TensorSpec
from tests.core.trainer import on_ranks

RANKS, STEPS = 3, 9
SPECS = (
    TensorSpec("words", (40, 8), role="embedding"),
    TensorSpec("hidden.weight", (30, 20)),
    TensorSpec("hidden.bias", (30,)),
    TensorSpec("head.weight", (9, 30)),
)
SIZE = sum(spec.size for spec in SPECS)
# Of one message, the largest error relative to the largest value under one scale; float32's last bits for fp32.
BOUNDS = {"fp32": 1e-6, "fp16": 2**-11, "bf16": 2**-8, "int8": 0.5 / 127, "int4": 0.5 / 7, "topk:0.2": 1.0}


def gradient(rank: int, step: int) -> np.ndarray:
    return np.random.default_rng((rank, step)).normal(size=SIZE).astype(np.float32)


def true_mean(step: int) -> np.ndarray:
    return np.mean([gradient(rank, step).astype(np.float64) for rank in range(RANKS)], axis=0)


def places() -> list[slice]:
    ends = np.cumsum([0, *(spec.size for spec in SPECS)])
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def average(mean: GradientMean, values: np.ndarray) -> np.ndarray:
    """A step's gradients, float32[SIZE] in the order of ``SPECS``, through all messages."""
    result, futures = np.empty_like(values), []
    for number, fragment in enumerate(mean.fragments):
        part = np.concatenate([values[places()[p]] for p in fragment.positions])
        futures.append((fragment, mean.send(number, part)))
    for fragment, future in futures:
        part, at = mean.wait(future), 0
        for p in fragment.positions:
            result[places()[p]] = part[at : at + SPECS[p].size]
            at += SPECS[p].size
    return result


def averaged(wire: str, messages: int = 1, beside: bool = False) -> np.ndarray:
    """[ranks, steps, SIZE]"""

    def body(transport: Transport) -> np.ndarray:
        mean = GradientMean(EveryStep(wire=wire), SPECS, TransportChannel(transport), messages, beside)
        return np.stack([average(mean, gradient(transport.rank, step)) for step in range(STEPS)])

    return np.stack(on_ranks(RANKS, body))


@pytest.mark.parametrize("wire", BOUNDS)
def test_what_is_sent_adds_up_to_the_true_means(wire: str) -> None:
    """What a step loses, the next ones send: sums over steps never differ by more than one message's loss, twice."""
    everyone = averaged(wire)
    assert (everyone == everyone[0]).all(), "ranks hold different gradients"
    sums = np.cumsum(everyone[0], axis=0, dtype=np.float64)
    wanted = np.cumsum([true_mean(step) for step in range(STEPS)], axis=0)
    largest = 3 * np.sqrt(STEPS) * 4 if wire.startswith("topk") else 6.0  # of a coded message: top-k keeps all it left
    assert np.abs(sums - wanted).max() <= 2 * BOUNDS[wire] * largest + 1e-5


@pytest.mark.parametrize("wire", BOUNDS)
def test_embeddings_and_vectors_go_exactly(wire: str) -> None:
    first = averaged(wire)[0, 0]
    for position, exact in enumerate((True, False, True, False)):
        place = places()[position]
        if exact or wire == "fp32":
            np.testing.assert_allclose(first[place], true_mean(0)[place], atol=1e-6)
        else:
            assert np.abs(first[place] - true_mean(0)[place]).max() > 1e-5


@pytest.mark.parametrize("wire", ["int8", "topk:0.2"])
def test_messages_beside_the_backward_pass_are_as_close(wire: str) -> None:
    everyone = averaged(wire, messages=3, beside=True)
    assert (everyone == everyone[0]).all()
    sums, wanted = everyone[0].sum(axis=0, dtype=np.float64), sum(true_mean(step) for step in range(STEPS))
    largest = 36.0 if wire.startswith("topk") else 6.0
    assert np.abs(sums - wanted).max() <= 2 * BOUNDS[wire] * largest


def test_messages_begin_with_the_last_tensors() -> None:
    def body(transport: Transport) -> list[tuple[int, ...]]:
        mean = GradientMean(EveryStep(wire="int8"), SPECS, TransportChannel(transport), messages=9)
        return [fragment.positions for fragment in mean.fragments]

    assert on_ranks(1, body)[0] == [(3,), (2,), (1,), (0,)]


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_spoils_one_step_on_every_rank(odd: float) -> None:
    """A gradient scaler on any rank then leaves the step out, and nothing of it comes later."""

    def body(transport: Transport) -> tuple[np.ndarray, np.ndarray]:
        mean = GradientMean(EveryStep(wire="int8"), SPECS, TransportChannel(transport))
        spoilt = gradient(transport.rank, 1)
        spoilt[7 if transport.rank == 1 else slice(0)] = odd
        results = [average(mean, g) for g in (gradient(transport.rank, 0), spoilt, gradient(transport.rank, 2))]
        return results[1], results[0] + results[2]

    for middle, others in on_ranks(RANKS, body):
        assert np.isnan(middle).all()
        np.testing.assert_allclose(others, true_mean(0) + true_mean(2), atol=2 * BOUNDS["int8"] * 6)


@pytest.mark.parametrize("wire", ["int4", "topk:0.2"])
def test_a_resumed_run_goes_on_bit_equal(wire: str) -> None:
    def body(transport: Transport) -> np.ndarray:
        plan = EveryStep(wire=wire)
        before = GradientMean(plan, SPECS, TransportChannel(transport), messages=2)
        for step in range(4):
            average(before, gradient(transport.rank, step))
        after = GradientMean(plan, SPECS, TransportChannel(transport), messages=2)
        after.load_state_dict(before.state_dict())
        assert after.metrics() == before.metrics()
        return np.stack([average(after, gradient(transport.rank, step)) for step in range(4, STEPS)])

    np.testing.assert_array_equal(np.stack(on_ranks(RANKS, body)), averaged(wire, messages=2)[:, 4:])


def test_a_state_of_another_wire_or_model_is_refused() -> None:
    def body(transport: Transport) -> None:
        channel = TransportChannel(transport)
        state = GradientMean(EveryStep(wire="int8"), SPECS, channel).state_dict()
        with pytest.raises(StateError, match="wire='int8'"):
            GradientMean(EveryStep(wire="int4"), SPECS, channel).load_state_dict(state)
        with pytest.raises(StateError, match="tensors"):
            GradientMean(EveryStep(wire="int8"), SPECS[1:], channel).load_state_dict(state)
        for name, rule in (("sent", "how many steps"), ("arrays", "residual' of shape .* it is not there")):
            mean = GradientMean(EveryStep(wire="int8"), SPECS, channel)
            with pytest.raises(StateError, match=rule):
                mean.load_state_dict({key: value for key, value in state.items() if key != name})

    on_ranks(1, body)


def test_ranks_at_different_steps_are_told() -> None:
    def body(transport: Transport) -> None:
        mean = GradientMean(EveryStep(wire="int8"), SPECS, TransportChannel(transport))
        mean._sent[0] = transport.rank  # as a rank that left steps out
        with pytest.raises(DesyncError, match="rank 2: round 2"):
            average(mean, gradient(transport.rank, 0))

    on_ranks(RANKS, body)


def test_ranks_that_bring_other_tensors_are_told_before_anything_travels() -> None:
    """Of the same sizes, too, as where each rank froze another layer: the sums would be of unlike gradients."""

    def body(transport: Transport) -> None:
        other = tuple(replace(spec, name=f"other {spec.name}") for spec in SPECS)
        specs = (other, SPECS[1:], SPECS)[transport.rank]
        mean = GradientMean(EveryStep(wire="int8"), specs, TransportChannel(transport))
        with pytest.raises(DesyncError, match="Rank 0 brings the gradients of other tensors than 1, 2"):
            mean.wait(mean.send(0, np.ones(mean.fragments[0].size, np.float32)))

    on_ranks(RANKS, body)


@pytest.mark.parametrize("size", [1e5, 1e30])
@pytest.mark.parametrize("wire", [wire for wire in BOUNDS if not wire.startswith("topk")])
def test_gradients_larger_than_float16_are_averaged_like_others(wire: str, size: float) -> None:
    """A loss scaler makes them: sent as float16's largest, they would be late by ever more steps, and say nothing."""

    def body(transport: Transport) -> np.ndarray:
        mean = GradientMean(EveryStep(wire=wire), SPECS, TransportChannel(transport))
        large = [average(mean, np.float32(size) * gradient(transport.rank, step)) for step in range(3)]
        return np.stack([np.float64(1 / size) * g for g in large])

    for found in on_ranks(RANKS, body):
        sums, wanted = np.cumsum(found, axis=0), np.cumsum([true_mean(step) for step in range(3)], axis=0)
        assert np.abs(sums - wanted).max() <= 2 * BOUNDS[wire] * 6 + 1e-5


def test_bytes_are_counted_by_the_formula() -> None:
    def body(transport: Transport) -> dict[str, float]:
        mean = GradientMean(EveryStep(wire="int8"), SPECS, TransportChannel(transport))
        for step in range(STEPS):
            average(mean, gradient(transport.rank, step))
        return mean.metrics()

    metrics = on_ranks(RANKS, body)[0]
    share = -(-870 // (RANKS * 256)) * 256  # of 600 + 270 coded values, whole rows of 256 each
    coded = 2 * (RANKS - 1) * (share + 4 * share // 256)
    exact = 2 * (RANKS - 1) * 4 * 350 // RANKS
    header = (RANKS - 1) * 9 * 8
    assert metrics["bytes_sent"] == STEPS * (coded + exact + header)
    assert metrics["rounds"] == STEPS


def test_complex_numbers_are_refused() -> None:
    def body(transport: Transport) -> None:
        with pytest.raises(PlanError, match="phases is complex64"):
            GradientMean(
                EveryStep(wire="int8"), (TensorSpec("phases", (3, 3), "complex64"),), TransportChannel(transport)
            )

    on_ranks(1, body)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"wire": "int5"}, "wire is one of fp32, fp16, bf16, int8, int4"),
        ({"wire": 8}, "wire is one of"),
        ({"wire": "topk:2"}, "0 < f <= 1"),
        ({"update": "sharded", "wire": "int8"}, 'update="sharded" gives each rank'),
        ({"update": "central", "wire": "fp16"}, 'update="central" gives each rank'),
    ],
)
def test_plans_that_cannot_be_are_refused(arguments: dict[str, str], rule: str) -> None:
    with pytest.raises(PlanError, match=rule):
        EveryStep(**arguments)


@pytest.mark.parametrize(
    ("reduction", "rule"),
    [
        (Reduction(op="sum"), "op=sum"),
        (Reduction(op="adasum"), "op=adasum"),
        (Reduction(predivide=2.0), "gradient_predivide_factor=2.0"),
        (Reduction(groups=2), "groups=..."),
    ],
)
def test_what_is_of_horovods_all_reduce_is_refused(reduction: Reduction, rule: str) -> None:
    with pytest.raises(PlanError, match=rule):
        EveryStep(wire="int8").check(reduction)
    EveryStep().check(reduction)
