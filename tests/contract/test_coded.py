"""Gradients in a narrow wire format: training ends where the core's arithmetic says, on the same bits everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from hvdscale.runtime.channel import TransportChannel
from hvdscale.runtime.transport import Transport, run_loopback
from hvdscale.sync import EveryStep
from hvdscale.sync.gradient_mean import GradientMean
from hvdscale.sync.tensors import TensorSpec
from tests.contract.driver import ContractDriver, crossed
from tests.contract.oracle import OPTIMIZERS, Weights, batches, gradients, initial_weights
from tests.contract.test_training import assert_equal

STEPS = 6
WIRES = ["fp16", "bf16", "int8", "int4", "topk:0.5"]


def expected(plan: EveryStep, kind: str, ranks: Sequence[int], passes: int = 1) -> Weights:
    """Every rank of ``ranks`` as a thread: the oracle's gradients through the core, the oracle's update."""
    wire = plan if len(ranks) > 1 else EveryStep()  # alone, nothing travels

    def body(transport: Transport) -> Weights:
        weights, update = initial_weights(), OPTIMIZERS[kind]()
        specs = [TensorSpec(str(i), w.shape) for i, w in enumerate(weights)]
        mean = GradientMean(wire, specs, TransportChannel(transport))
        order = mean.fragments[0].positions
        data = batches(STEPS * passes, ranks[transport.rank])
        for step in range(STEPS):
            every = [gradients(weights, b) for b in data[step * passes : (step + 1) * passes]]
            own = [sum(parts) for parts in zip(*every, strict=True)]
            flat = np.concatenate([own[p].ravel() for p in order]).astype(np.float32)
            parts = np.split(mean.wait(mean.send(0, flat)), np.cumsum([own[p].size for p in order])[:-1])
            averaged = {p: part.reshape(own[p].shape).astype(np.float64) for p, part in zip(order, parts, strict=True)}
            weights = update(weights, [averaged[p] for p in range(len(own))])
        return weights

    results: list[Any] = run_loopback(len(ranks), body)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results[0]  # type: ignore[no-any-return]


def start(driver: ContractDriver, plan: EveryStep, kind: str = "sgd", seed: int = 0, **more: Any) -> tuple[Any, Any]:
    model = driver.model(initial_weights(seed))
    return model, driver.distribute(driver.optimizer(kind, model), model, sync=plan, **more)


@pytest.mark.parametrize(("wire", "kind"), crossed(WIRES, ["sgd", "adam"]))
def test_training_equals_the_oracle(driver: ContractDriver, rank: int, size: int, wire: str, kind: str) -> None:
    plan = EveryStep(wire=wire)
    model, optimizer = start(driver, plan, kind, seed=rank)
    driver.train(model, optimizer, batches(STEPS, rank))
    weights = driver.weights(model)
    assert_equal(weights, expected(plan, kind, range(size)), 1e-5)
    everyone = driver.everyones(np.concatenate([w.ravel() for w in weights]))
    assert (everyone == everyone[0]).all(), "ranks hold different weights"


def test_coding_changes_what_is_averaged(size: int) -> None:
    """The comparison above is sharp enough: without error feedback, or with another wire, training ends elsewhere."""
    if size > 1:
        ends = [np.concatenate([w.ravel() for w in expected(EveryStep(wire=w), "sgd", range(size))]) for w in WIRES]
        assert min(np.abs(a - b).max() for i, a in enumerate(ends) for b in ends[:i]) > 1e-5


def test_several_passes_make_one_message(driver: ContractDriver, rank: int, size: int) -> None:
    plan = EveryStep(wire="int8")
    model, optimizer = start(driver, plan, backward_passes_per_step=2)
    driver.train(model, optimizer, batches(2 * STEPS, rank), passes=2)
    assert_equal(driver.weights(model), expected(plan, "sgd", range(size), passes=2), 1e-5)


def test_a_process_set_averages_apart(driver: ContractDriver, rank: int, size: int) -> None:
    plan = EveryStep(wire="int8")
    model, optimizer = start(driver, plan, process_set=driver.even_ranks)
    driver.train(model, optimizer, batches(STEPS, rank))
    peers = range(0, size, 2) if rank % 2 == 0 else [rank]
    assert_equal(driver.weights(model), expected(plan, "sgd", peers), 1e-5)


def test_a_resumed_run_goes_on_bit_equal(driver: ContractDriver, rank: int, size: int) -> None:
    plan, data = EveryStep(wire="int4"), batches(STEPS, rank)
    model, optimizer = start(driver, plan)
    driver.train(model, optimizer, data)
    whole = driver.weights(model)
    model, optimizer = start(driver, plan)
    driver.train(model, optimizer, data[:3])
    middle, state = driver.weights(model), optimizer.sync.state_dict()
    assert bool(state) == (size > 1)
    model, optimizer = start(driver, plan)
    driver.set_weights(model, middle)
    optimizer.sync.load_state_dict(state)
    driver.train(model, optimizer, data[3:])
    for resumed, wanted in zip(driver.weights(model), whole, strict=True):
        np.testing.assert_array_equal(resumed, wanted)


def test_what_was_sent_is_counted(driver: ContractDriver, rank: int, size: int) -> None:
    model, optimizer = start(driver, EveryStep(wire="int8"))
    driver.train(model, optimizer, batches(STEPS, rank))
    if size > 1:
        figures = optimizer.sync.metrics()
        assert figures["rounds"] == STEPS
        assert figures["bytes_sent"] > 0
        assert figures["seconds"] > 0


def test_ranks_with_different_wires_are_told(driver: ContractDriver, rank: int, size: int) -> None:
    if size == 1:
        return

    def trains() -> None:
        model, optimizer = start(driver, EveryStep(wire="int4" if rank == size - 1 else "int8"))
        driver.train(model, optimizer, batches(1, rank))

    with pytest.raises(driver.hvd.DesyncError, match="wire='int4'"):
        trains()


def test_what_does_not_go_with_a_wire_is_refused(driver: ContractDriver, rank: int) -> None:
    for arguments, rule in (
        ({"op": driver.hvd.Sum}, "op=sum"),
        ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor=2.0"),
        ({"groups": 2}, "groups=..."),
        ({"compression": driver.hvd.Compression.fp16}, "compression="),
    ):
        with pytest.raises(driver.hvd.PlanError, match=rule):
            start(driver, EveryStep(wire="int8"), **arguments)


def test_a_state_of_another_plan_is_refused(driver: ContractDriver, rank: int, size: int) -> None:
    if size == 1:
        return
    model, optimizer = start(driver, EveryStep(wire="int8"))
    driver.train(model, optimizer, batches(1, rank))
    state = optimizer.sync.state_dict()

    def resumes() -> None:
        model, optimizer = start(driver, EveryStep(wire="int4"))
        optimizer.sync.load_state_dict(state)
        driver.train(model, optimizer, batches(1, rank))

    with pytest.raises(driver.hvd.StateError, match="wire='int8'"):
        resumes()
