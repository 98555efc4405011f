"""The executor on ranks of this process: loss and gradients equal the whole model's, whatever the schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from hvdscale.errors import PlanError, TransportError
from hvdscale.model.actions import Schedule
from hvdscale.model.batch import cut
from hvdscale.model.executor import Executor
from hvdscale.model.passes import chain_links, with_messages, with_recompute, with_reductions
from hvdscale.model.schedules import SCHEDULES, make_schedule
from hvdscale.runtime.post import open_post
from hvdscale.runtime.transport import Transport, run_loopback
from tests.core.numpy_stages import NumpyStages, weights

WIDTH, SAMPLES = 5, 14


@dataclass(frozen=True)
class Case:
    schedule: str
    ranks: int
    microbatches: int
    chunks: int = 1
    recompute: bool = False
    skips: tuple[tuple[int, int], ...] = ()
    tie: bool = False

    @property
    def stages(self) -> int:
        return self.ranks * self.chunks

    def make(self) -> Schedule:
        bare = make_schedule(self.schedule, self.ranks, self.microbatches, self.chunks)
        if self.recompute:
            bare = with_recompute(bare)
        full = with_messages(bare, (*chain_links(self.stages), *self.skips))
        return with_reductions(full, [(0, self.stages - 1)] if self.tie else [])


def data(length: int = WIDTH) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    return random.normal(size=(SAMPLES, length)), random.normal(size=(SAMPLES, length))


def whole(case: Case) -> tuple[float, list[np.ndarray]]:
    """Loss and gradients of the model in one piece, the whole batch at once."""
    w = weights(case.stages, WIDTH, case.tie)
    x, y = data()
    alone = NumpyStages(case.stages, range(case.stages), w, case.skips, [x], [y], case.tie)
    inputs: dict[int, dict[int, Any]] = {s: {} for s in range(case.stages)}
    for stage in range(case.stages):
        for target, bundle in alone.forward(stage, 0, inputs[stage], keep=True).items():
            inputs[target][stage] = bundle
    back: dict[int, dict[int, Any]] = {s: {} for s in range(case.stages)}
    for stage in reversed(range(case.stages)):
        for source, given in alone.backward(stage, 0, back[stage]).items():
            back[source][stage] = given
    gradients = [alone.gradient[s] for s in range(case.stages)]
    if case.tie:
        gradients[0] = gradients[-1] = gradients[0] + gradients[-1]
    return alone.losses[0], gradients


def run(case: Case, runs: int = 2) -> list[tuple[float, dict[int, np.ndarray], list[str], int]]:
    """What each rank has at the end of the last of ``runs`` runs: the second one knows all shapes."""
    schedule = case.make()
    x, y = data()
    pieces = cut(SAMPLES, case.microbatches)

    def body(transport: Transport) -> Any:
        own = schedule.stages_of(transport.rank)
        w = weights(case.stages, WIDTH, case.tie)
        cut_x, cut_y = [x[p] for p in pieces], [y[p] for p in pieces]
        stages = NumpyStages(case.stages, own, w, case.skips, cut_x, cut_y, case.tie)
        post = open_post(transport)
        executor = Executor(post, stages, [(0, case.stages - 1)] if case.tie else [])
        for _ in range(runs):
            for gradient in stages.gradient.values():
                gradient[:] = 0
            stages.log.clear()
            before = post.sent_bytes
            executor.run(schedule, "same shapes")
        return sum(stages.losses.values()), stages.gradient, stages.log, post.sent_bytes - before

    results = run_loopback(case.ranks, body, timeout_seconds=10)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


CASES = [
    *(Case(name, ranks, m) for name in SCHEDULES for ranks in (2, 4) for m in (1, 2, 4, 7)),
    *(Case(name, 2, 5, chunks) for name in ("gpipe", "interleaved") for chunks in (2, 3)),
    *(Case(name, 4, 5, recompute=True) for name in SCHEDULES),
    *(Case(name, 4, 5, tie=True) for name in SCHEDULES),
    *(Case(name, 4, 5, skips=((0, 2), (0, 3), (1, 3))) for name in SCHEDULES),
    Case("interleaved", 2, 4, 2, recompute=True, skips=((0, 2), (1, 3), (0, 3)), tie=True),
    Case("1f1b", 1, 3),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("runs", [1, 2], ids=["learning", "ahead"])
def test_loss_and_gradients_are_the_whole_models(case: Case, runs: int) -> None:
    loss, gradients = whole(case)
    results = run(case, runs)
    assert results[-1][0] == pytest.approx(loss, rel=1e-12)
    for rank, (_, held, log, _) in enumerate(results):
        assert sorted(held) == list(range(rank, case.stages, case.ranks))
        for stage, gradient in held.items():
            np.testing.assert_allclose(gradient, gradients[stage], rtol=1e-10, atol=1e-13)
        done = [word for word in log if word.startswith("D")]
        assert sorted(done) == sorted(f"D@{stage}" for stage in held)
        again = [word for word in log if word.startswith("C")]
        assert len(again) == case.recompute * case.microbatches * len(set(held) - {case.stages - 1})
    if case.tie:
        np.testing.assert_array_equal(results[0][1][0], results[-1][1][case.stages - 1])


def test_only_what_must_travel_does() -> None:
    """Activations forward, gradients back, the vector without a gradient forward alone; no header once it is known."""
    results = run(Case("1f1b", 2, 4))
    activations = SAMPLES * WIDTH * 8
    assert [sent for *_, sent in results] == [activations + 4 * 3 * 8, activations]


def test_a_rank_that_fails_tells_those_who_wait() -> None:
    schedule = Case("1f1b", 2, 4).make()
    x, y = data()
    pieces = cut(SAMPLES, 4)

    def body(transport: Transport) -> None:
        w = weights(2, WIDTH, False)
        args = [x[p] for p in pieces], [y[p] for p in pieces]
        stages = NumpyStages(2, [transport.rank], w, (), *args, False)
        if transport.rank == 1:
            stages.y = []  # the loss of the first micro-batch raises
        Executor(open_post(transport), stages).run(schedule, "")

    first, second = run_loopback(2, body, timeout_seconds=5)
    assert isinstance(second, IndexError)
    assert isinstance(first, TransportError)
    assert "rank 1 closed its post" in str(first)


def test_shapes_that_depend_on_values_are_refused() -> None:
    schedule = Case("gpipe", 2, 1).make()

    def body(transport: Transport) -> None:
        stages = NumpyStages(2, [transport.rank], weights(2, WIDTH, False), (), [data()[0]], [data()[1]], False)
        executor = Executor(open_post(transport), stages)
        for rows in (SAMPLES, SAMPLES - 1):
            stages.x, stages.y = [data()[0][:rows]], [data()[1][:rows]]
            executor.run(schedule, "said to be the same")

    first, second = run_loopback(2, body, timeout_seconds=5)
    assert isinstance(first, PlanError)
    assert f"float64[{SAMPLES}, {WIDTH}]" in str(first)
    assert f"float64[{SAMPLES - 1}, {WIDTH}]" in str(first)
    assert isinstance(second, TransportError)
