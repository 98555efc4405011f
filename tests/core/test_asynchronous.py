"""Training under a parameter server, on ranks that are threads: with staleness 0 it is synchronous training."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hvdscale.errors import DesyncError, HvdscaleError, PlanError, StateError, TransportError
from hvdscale.runtime.post import open_post
from hvdscale.runtime.service import Service
from hvdscale.runtime.transport import SoloTransport, Transport, run_loopback
from hvdscale.sync import Asynchronous, LocalSGD, ParameterServer, Reduction
from hvdscale.sync.handle import LocalSync
from tests.core.numpy_store import NumPyStore, NumPyTensors
from tests.core.quadratic import FRAGMENTS, SHAPES, Quadratic, start
from tests.relaxed_oracle import Momentum, trajectory

LR = 0.1


class Trainer:
    """One rank: its own quadratic, gradient descent with momentum in float32, and the servers of ``plan``."""

    def __init__(
        self, plan: ParameterServer, transport: Transport, momentum: float = 0.0, dtype: Any = np.float32
    ) -> None:
        flat, places = start(), np.cumsum([0, 30, 7, 12])
        self.arrays = {
            name: flat[a:b].reshape(shape).astype(dtype)
            for (name, shape), a, b in zip(SHAPES.items(), places, places[1:], strict=False)
        }
        self.buffers = {"mean": np.full(3, float(transport.rank), np.float32), "var": np.ones(3, np.float32)}
        self.velocity = np.zeros(49)
        self._momentum, self._problem = momentum, Quadratic.of(transport.rank)
        statistics = NumPyTensors(self.buffers, {"mean": "mean", "var": "variance"})
        moment = NumPyTensors({"velocity": self.velocity})
        self.store = NumPyStore(NumPyTensors(self.arrays), buffers=statistics, moment=moment, rate=LR)
        self.engine = Asynchronous(plan, self.store, lambda: open_post(transport))

    def flat(self) -> np.ndarray:
        return np.concatenate([array.ravel() for array in self.arrays.values()]).astype(np.float64)

    def train(self, steps: int, pause_seconds: float = 0.0) -> None:
        for _ in range(steps):
            time.sleep(pause_seconds)
            self.engine.before_step()
            gradient = self._problem.gradient(self.flat())
            self.velocity *= self._momentum
            self.velocity += gradient
            at = 0
            for array in self.arrays.values():
                array -= (LR * self.velocity[at : at + array.size]).reshape(array.shape).astype(array.dtype)
                at += array.size
            self.engine.after_step()


def on_ranks(ranks: int, body: Callable[[Transport], Any], timeout_seconds: float = 90.0) -> list[Any]:
    results = run_loopback(ranks, body, timeout_seconds)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def train(plan: ParameterServer, ranks: int, steps: int = 11, momentum: float = 0.0) -> np.ndarray:
    """Weights of every rank after a flush, [ranks, 49]."""

    def body(transport: Transport) -> np.ndarray:
        trainer = Trainer(plan, transport, momentum)
        if trainer.engine.trains:
            trainer.train(steps)
        trainer.engine.flush()
        return trainer.flat()

    return np.stack(on_ranks(ranks, body))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    ("plan", "ranks", "workers"),
    [
        (ParameterServer(0), 3, 3),
        (ParameterServer(0, servers=1), 3, 3),
        (ParameterServer(0, every=4, outer_lr=0.7, outer_momentum=0.9), 3, 3),
        (ParameterServer(0, dedicated=True, servers=2), 4, 2),
        (ParameterServer(None), 1, 1),
    ],
    ids=repr,
)
def test_without_staleness_it_follows_the_synchronous_oracle(
    plan: ParameterServer, ranks: int, workers: int, momentum: float
) -> None:
    outer = ("nesterov", plan.outer_lr, plan.outer_momentum)
    gradients = [Quadratic.of(rank).gradient for rank in range(workers)]
    expected = trajectory(gradients, start(), FRAGMENTS[1], 11, plan.every, lambda: Momentum(LR, momentum), outer=outer)
    weights = train(plan, ranks, momentum=momentum)
    np.testing.assert_allclose(weights, np.broadcast_to(expected[0], weights.shape), atol=2e-6)


@pytest.mark.parametrize(("staleness", "servers"), [(1, None), (4, 1), (None, 2)])
def test_every_rank_ends_with_the_same_bits(staleness: int | None, servers: int) -> None:
    weights = train(ParameterServer(staleness, servers=servers), 3, steps=30)
    assert (weights == weights[0]).all()
    if staleness is not None:  # without a bound one may train alone in the end, towards its own problem
        synchronous = train(ParameterServer(0), 3, steps=30)[0]
        moved = np.linalg.norm(synchronous - start())
        assert np.linalg.norm(weights[0] - synchronous) < 0.5 * moved


def test_a_straggler_holds_back_and_metrics_tell() -> None:
    """Rank 1 takes 50 ms for a step: nobody is more than 2 pushes ahead, and someone gets so far."""
    plan = ParameterServer(2)

    def body(transport: Transport) -> dict[str, float]:
        trainer = Trainer(plan, transport)
        trainer.train(8, 0.05 * (transport.rank == 1))
        figures = trainer.engine.figures()
        trainer.engine.flush()
        assert trainer.engine.figures()["rounds"] == 8
        assert sum(n for name, n in figures.items() if name in {f"stale_{k}" for k in range(99)}) == 8
        return figures

    first, straggler, third = on_ranks(3, body)
    assert max(figures["lead_max"] for figures in (first, straggler, third)) == 2
    assert straggler["stale_max"] >= 2
    assert first["bytes_sent"] > 8 * 2 * 49 * 4 / 3
    assert first["server_cpu_seconds"] > 0


def test_figures_go_on_with_another_store_and_in_a_resumed_run() -> None:
    def body(transport: Transport) -> None:
        trainer = Trainer(ParameterServer(0), transport)
        trainer.train(20)
        before = trainer.engine.figures()
        trainer.engine = trainer.engine.over(trainer.store)
        trainer.train(1)
        saved, after = trainer.engine.state_dict(), trainer.engine.figures()
        trainer.engine.flush()
        resumed = Trainer(ParameterServer(0), transport)
        resumed.engine.load_state_dict(saved)
        resumed.engine.flush()
        for one, other in ((before, after), (after, resumed.engine.figures())):
            assert other["bytes_sent"] > one["bytes_sent"] > 0
            assert other["server_cpu_seconds"] > one["server_cpu_seconds"] > 0

    on_ranks(2, body)


def test_ranks_that_finish_early_are_no_hindrance_and_training_goes_on_after_a_flush() -> None:
    def body(transport: Transport) -> tuple[np.ndarray, float, np.ndarray]:
        trainer = Trainer(ParameterServer(1, every=2), transport)
        trainer.train((3, 6, 11)[transport.rank])
        trainer.engine.flush()
        trainer.train(4)
        trainer.engine.flush()
        return trainer.flat(), trainer.engine.figures()["rounds"], trainer.buffers["mean"]

    results = on_ranks(3, body)
    assert [rounds for _, rounds, _ in results] == [4, 5, 8]
    for weights, _, mean in results:
        np.testing.assert_array_equal(weights, results[0][0])
        np.testing.assert_allclose(mean, 1.0)  # of 0, 1 and 2


def test_a_rank_with_nan_does_not_vote_and_recovers_with_its_moments() -> None:
    def body(transport: Transport) -> tuple[np.ndarray, float]:
        trainer = Trainer(ParameterServer(1), transport, momentum=0.5)
        trainer.train(2)
        if transport.rank == 1:
            trainer.arrays["b"][0] = np.nan
            with pytest.warns(RuntimeWarning, match="Rank 1 brought"):
                trainer.train(1)
            assert trainer.engine.anew == 3
        trainer.train(3 - transport.rank)
        trainer.engine.flush()
        return trainer.flat(), trainer.engine.figures()["not_finite"]

    results = on_ranks(2, body)
    assert np.isfinite(results[0][0]).all()
    assert [n for _, n in results] == [0, 1]


@pytest.mark.parametrize(("samples", "mean"), [((16, 48), 0.75), ((0, 8), 1)], ids=["weigh", "none do not count"])
def test_samples(samples: tuple[int, int], mean: float) -> None:
    def body(transport: Transport) -> np.ndarray:
        trainer = Trainer(ParameterServer(0), transport)
        trainer.engine.before_step()
        for array in trainer.arrays.values():
            array += transport.rank
        trainer.engine.tell(loss=1.0, samples=samples[transport.rank])
        trainer.engine.after_step()
        trainer.engine.flush()
        return trainer.flat()

    for weights in on_ranks(2, body):
        np.testing.assert_allclose(weights, start() + mean, rtol=1e-6)


def test_complex_weights_are_refused() -> None:
    store = NumPyStore(NumPyTensors({"w": np.zeros(3, np.complex64)}))
    with pytest.raises(PlanError, match="ParameterServer sends real numbers, as Horovod does, and w is complex64"):
        Asynchronous(ParameterServer(1), store, lambda: open_post(SoloTransport()))


def test_weights_in_half_precision_have_shared_ones_in_float32() -> None:
    def body(transport: Transport) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        trainer = Trainer(ParameterServer(0), transport, dtype=np.float16)
        sync = LocalSync(trainer.engine, trainer.store, lambda weights: weights)
        trainer.train(2)
        before = np.concatenate([w.ravel() for w in sync.outer_weights().values()])
        for _ in range(20):
            trainer.engine.after_step()  # a step that moved nothing
        after = np.concatenate([w.ravel() for w in sync.outer_weights().values()])
        sync.flush()
        return before, after, trainer.flat()

    for before, after, weights in on_ranks(2, body):
        np.testing.assert_allclose(after, before, atol=1e-7)
        assert np.abs(after - weights).max() > 1e-5


@pytest.mark.parametrize("stop", [4, 5])
@pytest.mark.parametrize(
    "plan",
    [ParameterServer(0, every=2, outer_momentum=0.9, outer_lr=0.7), ParameterServer(0, servers=1), ParameterServer(3)],
    ids=repr,
)
def test_killed_and_resumed_goes_on(plan: ParameterServer, stop: int) -> None:
    """With staleness 0 to the last bit; otherwise what chance decides is another order, and nothing is lost."""

    def interrupted(transport: Transport) -> tuple[np.ndarray, float]:
        trainer = Trainer(plan, transport)
        trainer.train(stop)
        saved = trainer.engine.state_dict()
        numbers = json.dumps({name: value for name, value in saved.items() if name != "arrays"})
        arrays = {name: array.copy() for name, array in trainer.arrays.items()}
        trainer.train(1)  # of a run that is then lost
        trainer.engine.flush()
        resumed = Trainer(plan, transport)
        for name, array in arrays.items():
            resumed.arrays[name][...] = array
        resumed.engine.load_state_dict({**json.loads(numbers), "arrays": saved["arrays"]})
        resumed.train(11 - stop)
        resumed.engine.flush()
        return resumed.flat(), resumed.engine.figures()["rounds"]

    results = on_ranks(2, interrupted)
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert {rounds for _, rounds in results} == {-(-11 // plan.every)}
    if plan.staleness == 0:
        np.testing.assert_array_equal(results[0][0], train(plan, 2)[0])


def test_other_states_are_refused() -> None:
    trainer = Trainer(ParameterServer(0), SoloTransport())
    trainer.train(2)
    state = trainer.engine.state_dict()
    for change, rule in [
        ({"rank": 1}, "its rank is 1"),
        ({"plan": {"plan": "other"}}, "its plan is"),
        ({"arrays": {}}, "array 'base'"),
        ({"arrays": {"base": state["arrays"]["base"]}}, "'server.0'"),
    ]:
        with pytest.raises(StateError, match=rule):
            Trainer(ParameterServer(0), SoloTransport()).engine.load_state_dict({**state, **change})


def test_saving_while_another_rank_flushes_is_an_error_on_both() -> None:
    def body(transport: Transport) -> None:
        trainer = Trainer(ParameterServer(2), transport)
        trainer.train(2)
        trainer.engine.flush() if transport.rank else trainer.engine.state_dict()

    results = run_loopback(2, body)
    assert all(isinstance(result, DesyncError) for result in results)
    assert "rank 0: saving, after 2 pushes\n  rank 1: flushing, after 2 pushes" in str(results[0])


def leave(trainer: Trainer) -> None:
    """As a process does that ends."""
    trainer.engine._service.close()


def test_who_gives_up_a_service_does_not_wait_for_its_thread() -> None:
    """An engine may be collected as garbage, in any thread: also where the service's thread can go no further."""
    asked, go_on = threading.Event(), threading.Event()

    class Slow:
        def answer(self, source: int, message: Any) -> list[tuple[int, Any]]:
            asked.set()
            assert go_on.wait(30)
            return [(source, message)]

        def lose(self, rank: int) -> list[tuple[int, Any]]:
            return []

    def body(transport: Transport) -> Any:
        service = Service(open_post(transport), False, [0], 30.0)
        if transport.rank == 1:
            got = service.ask({0: np.arange(3, dtype=np.uint8)})[0].tolist()
            service.part()
            return got
        service.serve(Slow())
        assert asked.wait(30)
        service.part()  # returns, though the thread does not
        went_on = service._thread.is_alive()
        go_on.set()
        service.close()
        return went_on, service._thread.is_alive()

    assert on_ranks(2, body) == [(True, False), [0, 1, 2]]


def test_a_rank_may_shut_down_right_after_its_flush() -> None:
    """Rank 0 has its own answer, and shuts down while that to rank 1 is still to be sent."""

    def body(transport: Transport) -> np.ndarray:
        trainer = Trainer(ParameterServer(0, servers=1), transport)
        trainer.train(3)
        post, flushing = trainer.engine._post, threading.Event()
        send = post.send

        def slowly(data: np.ndarray, to: int, tag: int) -> Any:
            if flushing.is_set() and threading.current_thread() is trainer.engine._service._thread and data.size > 1:
                time.sleep(0.5)
            return send(data, to, tag)

        post.send = slowly  # type: ignore[method-assign]
        transport.allgather(b"")
        flushing.set()
        trainer.engine.flush()
        transport.close()
        assert not trainer.engine._service._thread.is_alive()
        return trainer.flat()

    first, second = on_ranks(2, body)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("staleness", [0, 2, None])
def test_with_continue_the_others_go_on_without_a_worker_that_left(staleness: int | None) -> None:
    plan = ParameterServer(staleness, servers=1, on_failure="continue")

    def body(transport: Transport) -> Any:
        trainer = Trainer(plan, transport)
        trainer.train(3)
        if transport.rank == 2:
            leave(trainer)
            return None
        trainer.train(9)
        trainer.engine.flush()
        return trainer.flat(), trainer.engine.figures()

    first, second, _ = run_loopback(3, body)
    np.testing.assert_array_equal(first[0], second[0])
    assert first[1]["ranks_lost"] == 1
    assert first[1]["rounds"] == 12


@pytest.mark.parametrize(("on_failure", "leaver"), [("stop", 1), ("continue", 0)])
def test_a_rank_that_left_too_early_is_named(on_failure: Any, leaver: int) -> None:
    """Always with "stop"; with "continue" where it held a part of the weights."""
    plan = ParameterServer(1, servers=1, on_failure=on_failure)

    def body(transport: Transport) -> None:
        trainer = Trainer(plan, transport)
        trainer.train(3)
        leave(trainer) if transport.rank == leaver else trainer.train(9)

    results = run_loopback(2, body)
    assert isinstance(results[1 - leaver], TransportError)
    assert f"rank {leaver} left the job" in str(results[1 - leaver])


def test_a_rank_that_falls_silent_is_named_in_time() -> None:
    plan, silent = ParameterServer(1, servers=1, patience_seconds=1.0), threading.Event()

    def body(transport: Transport) -> float:
        trainer = Trainer(plan, transport)
        trainer.train(3)
        if transport.rank:
            trainer.engine._service._look = sys.exit  # its thread ends, as with the process
            silent.wait(20)
            return 0.0
        started = time.monotonic()
        with pytest.raises(TransportError, match="rank 1 has given no sign of life for 1 s"):
            trainer.train(9)
        silent.set()
        return time.monotonic() - started

    assert on_ranks(2, body)[0] < 10


def test_a_rank_that_stood_still_too_long_is_told_that_it_was_counted_out() -> None:
    plan = ParameterServer(1, servers=1, on_failure="continue", patience_seconds=1.0)
    done = threading.Event()

    def body(transport: Transport) -> float:
        trainer = Trainer(plan, transport)
        trainer.train(3)
        if transport.rank:
            service = trainer.engine._service
            look, awake = service._look, time.monotonic() + 2.5
            service._look = lambda: look() if time.monotonic() > awake else bool(time.sleep(0.01))
            while time.monotonic() < awake + 10 and not service.counted_out:
                time.sleep(0.01)
            with pytest.raises(TransportError, match="rank 1 stood still for longer than patience_seconds=1"):
                trainer.train(1)
            done.set()
            return 0.0
        trainer.train(9)
        assert done.wait(20)  # someone has to be there to tell it
        trainer.engine.flush()
        return trainer.engine.figures()["ranks_lost"]

    assert on_ranks(2, body)[0] == 1


BAD: list[tuple[dict[str, Any], str]] = [
    ({"staleness": -1}, "staleness .* whole number from 0; it is -1"),
    ({"staleness": 1.5}, "staleness .* it is 1.5"),
    ({"staleness": 0, "servers": 0}, "servers must be a whole number from 1"),
    ({"staleness": 0, "every": 0}, "every must be a whole number from 1"),
    ({"staleness": 0, "outer_momentum": 1.0}, "outer momentum must be a number at least 0 and below 1"),
    ({"staleness": 0, "on_failure": "hope"}, '"stop" or "continue"'),
    ({"staleness": 0, "dedicated": True, "warmup": 3}, "warmup=3"),
    ({"staleness": 0, "patience_seconds": 0}, "patience_seconds must be a number at least 1"),
]


@pytest.mark.parametrize(("arguments", "rule"), BAD, ids=str)
def test_a_plan_that_cannot_be_is_refused(arguments: dict[str, Any], rule: str) -> None:
    with pytest.raises(PlanError, match=rule):
        ParameterServer(**arguments)


@pytest.mark.parametrize(
    ("plan", "ranks", "rule"),
    [
        (ParameterServer(1, servers=3), 2, "servers=3, and 2 ranks"),
        (ParameterServer(1, servers=2, dedicated=True), 2, "none is left to train"),
        (ParameterServer(1, dedicated=True), 1, "none is left to train"),
    ],
)
def test_servers_must_fit_the_world(plan: ParameterServer, ranks: int, rule: str) -> None:
    with pytest.raises(PlanError, match=rule):
        plan.worker_ranks(ranks)


def test_gradients_summed_or_divided_do_not_go_with_it() -> None:
    for reduction in (Reduction(op="sum"), Reduction(predivide=2.0), Reduction(groups=2)):
        with pytest.raises(PlanError, match="ParameterServer"):
            ParameterServer(1).check(reduction)
    LocalSGD(2).check(Reduction())


def test_a_rank_set_aside_does_not_step_and_ends_with_what_the_others_have() -> None:
    def body(transport: Transport) -> list[dict[str, np.ndarray]]:
        trainer = Trainer(ParameterServer(1, dedicated=True), transport)
        found = []
        for spoilt in (False, True):
            if transport.rank == 2:
                with pytest.raises(PlanError, match="rank 2 is set aside"):
                    trainer.train(1)
            else:
                trainer.train(1)
                trainer.buffers["mean"] *= np.nan if spoilt else 1
            trainer.engine.flush()
            found.append({name: values.copy() for name, values in trainer.buffers.items()})
        return found

    everyone = on_ranks(3, body)
    for first, second in everyone:
        np.testing.assert_allclose(first["mean"], 0.5)  # of 0 and 1
        np.testing.assert_allclose(first["var"], 1.25)
        np.testing.assert_allclose(second["var"], 1.25)  # no rank had a mean: each keeps what it has
    np.testing.assert_allclose(everyone[2][1]["mean"], 0.5)
    assert issubclass(PlanError, HvdscaleError)
